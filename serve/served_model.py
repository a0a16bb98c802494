"""The model that is served: as requests meet it, and as people read of it."""

import time
from dataclasses import dataclass, field
from typing import Final

from dynamo.serve.engine.request import SamplingDefaults
from dynamo.serve.prompt import TextCodec

__all__ = ["MOCK_MAX_MODEL_LEN", "ModelSummary", "ServedModel"]

MOCK_MAX_MODEL_LEN: Final = 131_072
"""Context of a mocked model, whatever its folder says, unless the user asks for another."""


@dataclass(slots=True, kw_only=True)
class ServedModel:
    """The model as clients know it.

    Attributes:
        max_model_len: most tokens of prompt and completion together. A front adapts it to its workers as they come and go.
    """

    name: str
    codec: TextCodec
    max_model_len: int
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """The model for people.

    Attributes:
        num_parameters: None where there is no model.
        max_model_len: what the model itself, or the user, asks for; the device cache may allow less.
    """

    description: str
    num_parameters: int | None
    device: str
    dtype: str
    max_model_len: int
