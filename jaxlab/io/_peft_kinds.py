"""Every type of PEFT's that is ours too, and our methods by type."""

from . import _peft_lora as lora, _peft_others as others, _peft_random as random
from ._peft_kind import Kind

KINDS: dict[str, Kind] = lora.KINDS | others.KINDS | random.KINDS

METHODS = {
    "ADALORA": "adalora",
    "BOFT": "boft",
    "C3A": "c3a",
    "DELORA": "delora",
    "FOURIERFT": "fourierft",
    "GRALORA": "gralora",
    "HIRA": "hira",
    "HRA": "hra",
    "IA3": "ia3",
    "LOHA": "loha",
    "LOKR": "lokr",
    "LORA": "lora dora pissa olora mica kasa corda lora_ga",
    "MISS": "miss",
    "OFT": "oft",
    "OSF": "osf",
    "PSOFT": "psoft",
    "RANDLORA": "randlora",
    "ROAD": "road",
    "SHIRA": "shira",
    "TINYLORA": "tinylora",
    "UNILORA": "unilora",
    "VBLORA": "vblora",
    "VERA": "vera",
    "WAVEFT": "waveft",
}
"""The names of our functions whose adapters a type can hold."""
