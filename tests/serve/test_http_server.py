"""What is settled before a server listens."""

import pytest

from dynamo.serve.config import ServerSettings
from dynamo.serve.errors import ConfigError
from dynamo.serve.http_server import bind


@pytest.mark.parametrize("host", ["a" * 300, "no..host", "203.0.113.1"])
def test_a_host_that_is_none_of_this_machine_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        bind(ServerSettings(host=host, port=0))
