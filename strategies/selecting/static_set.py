"""The static set of policies that always attend to the first tokens and to the most recent ones."""

from typing import Literal

from pydantic import Field

from kvbench.contract.extension import Options

PRESETS = {"small": (4, 64), "published": (128, 512)}
"""Sinks and window: four sinks (StreamingLLM) and 64 recent tokens, or RetrievalAttention's 128 + 512."""


HOT = Field(
    0, ge=0, description="tokens of each head that a hot set on the device keeps of those fetched from the host, in "
    "decoding steps of fixed shapes; 0 for none, else at least as many as a step chooses",
)  # fmt: skip


class StaticSetOptions(Options):
    """Sizes of the static set."""

    preset: Literal["small", "published"] = Field(
        "small", description="small: 4 sinks + 64 recent; published: 128 + 512"
    )
    sinks: int | None = Field(None, ge=0, description="first tokens, always attended; the preset's by default")
    window: int | None = Field(None, ge=1, description="most recent tokens, always attended; the preset's by default")

    def sizes(self) -> tuple[int, int]:
        """Sinks and window, in tokens."""
        sinks, window = PRESETS[self.preset]
        return sinks if self.sinks is None else self.sinks, window if self.window is None else self.window
