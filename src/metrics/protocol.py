"""Under what conditions a distance between videos was measured, and which name it may therefore carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

# FVD and KVD of the literature are measured on 2,048 videos or more; the finite-sample bias of the Fréchet
# distance falls as 1/n, so that fewer videos give another quantity.
STANDARD_NUM_VIDEOS = 2048
STANDARD_FEATURES = "i3d"
_SHORT_NAMES = {"frechet_distance": "fvd", "kernel_distance": "kvd"}


@dataclass(frozen=True)
class Protocol:
    """Everything that a distance between real and generated videos depends on besides the model.

    Attributes:
        features: name of the feature extractor, `i3d` for the TF-Hub Kinetics-400 logits.
        num_real, num_generated: videos on each side.
        num_frames, frame_stride: of every clip; the stride is that of the real videos' sampling.
        resolution: height and width of the videos that are compared, before the extractor resizes them.
        resize: how frames reach the extractor's size.
        dataset, split: where the real clips come from.
        clip_choice: which clip of a real video is taken.
        seed: of clip choice and sampling.
        arithmetic: of the distances.
    """

    features: str
    num_real: int
    num_generated: int
    num_frames: int
    frame_stride: int
    resolution: tuple[int, int]
    resize: str
    dataset: str
    split: str
    clip_choice: str
    seed: int
    arithmetic: str = "float64"

    def __post_init__(self) -> None:
        if min(self.num_real, self.num_generated) < 2:
            raise ValueError(
                f"a distance needs at least 2 videos on each side, got {self.num_real} real, "
                f"{self.num_generated} generated"
            )

    @property
    def is_standard(self) -> bool:
        """Whether the literature's bare names are honest here: I3D and 2,048 videos or more on both sides."""
        enough = min(self.num_real, self.num_generated) >= STANDARD_NUM_VIDEOS
        return self.features == STANDARD_FEATURES and enough

    def name(self, metric: str) -> str:
        """The name under which to report a metric: `fvd`, or say `frechet_distance_i3d_n64`.

        Args:
            metric: `frechet_distance` (alias `fvd`) or `kernel_distance` (alias `kvd`).
        """
        aliases = {short: long for long, short in _SHORT_NAMES.items()}
        metric = aliases.get(metric, metric)
        if metric not in _SHORT_NAMES:
            raise ValueError(f"unknown metric {metric!r}; choices: {', '.join([*_SHORT_NAMES, *aliases])}")
        if self.is_standard:
            return _SHORT_NAMES[metric]
        equal = self.num_real == self.num_generated
        count = f"n{self.num_real}" if equal else f"n{self.num_real}vs{self.num_generated}"
        return f"{metric}_{self.features}_{count}"

    def sentence(self) -> str:
        """One line for people: what was compared with what, and how."""
        height, width = self.resolution
        stride = "every frame" if self.frame_stride == 1 else f"every {_ordinal(self.frame_stride)} frame"
        return (
            f"{self.num_generated:,} generated against {self.num_real:,} real clips "
            f"({self.dataset}, {self.split}; {self.clip_choice}), "
            f"{self.num_frames} frames ({stride}) at {height}×{width}, features {self.features} "
            f"after {self.resize}, {self.arithmetic}, seed {self.seed}."
        )

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return {**asdict(self), "resolution": list(self.resolution)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Protocol:
        """The protocol that `to_dict` gave; raises ValueError naming fields that are missing or unknown."""
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise ValueError(
                f"a protocol has the fields {sorted(known)}; missing {sorted(known - set(values))}, "
                f"unknown {sorted(set(values) - known)}"
            )
        return cls(**{**values, "resolution": tuple(values["resolution"])})  # type: ignore[arg-type]


def _ordinal(number: int) -> str:
    if 10 <= number % 100 <= 20:
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
