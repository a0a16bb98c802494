from dynamo.kvcache.chain_roots import ChainRoots
from dynamo.kvcache.hashing import chain_root


def test_every_salt_and_adapter_has_the_root_of_its_own_however_many_there_are():
    roots = ChainRoots(b"model-a.", 16)
    names = [(f"salt-{i % 40}", f"lora-{i // 40}") for i in range(1200)]
    for _ in range(2):
        for salt, lora in names:
            assert roots.get(salt, lora) == chain_root(b"model-a.", 16, salt=salt, lora=lora)
    assert len({roots.get(salt, lora) for salt, lora in names}) == len(names)
