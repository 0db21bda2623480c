"""Any speech endpoint as one interface: a server over HTTP, a hosted API, or a checkpoint in this process."""

from revox.endpoints.endpoint import Endpoint, ReferenceClip, SpeechAnswer, SpeechQuery
from revox.endpoints.errors import EndpointError
from revox.endpoints.open import key_variables, open_endpoint, open_endpoints

__all__ = [
    "Endpoint",
    "EndpointError",
    "ReferenceClip",
    "SpeechAnswer",
    "SpeechQuery",
    "key_variables",
    "open_endpoint",
    "open_endpoints",
]
