"""What timm is taught: a model called `orthoact`, which is a base model with its record applied.

A folder or Hub repository then names the architecture `orthoact`; timm without this package answers "Unknown model".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .files import bounded
from .hooks import wrap
from .record import SENTINEL, attach_timm, check_tensors, install


def _bounded(read: Callable) -> Callable:
    def load_cfg_from_json(json_file: Any) -> Any:
        bounded(json_file)  # from the folder of somebody else, and read whole
        return read(json_file)

    return load_cfg_from_json


def register() -> None:
    """Put the entrypoint into timm's registry; doing it twice changes nothing."""
    from timm.models import _hub, is_model, register_model

    wrap(_hub, "load_cfg_from_json", _bounded)
    if not is_model(SENTINEL):
        register_model(orthoact)


def orthoact(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    base: str = "",
    orthoact: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    **kwargs: Any,
):
    """Timm's entrypoint for converted models: `base` is the architecture, `orthoact` the record of its activations.

    Called by `timm.create_model("local-dir:FOLDER", pretrained=True)` and its like, never by hand.
    """
    import timm
    from timm.models._builder import load_pretrained

    from ..interp.errors import OrthoactError

    if not base or not orthoact:
        raise OrthoactError(
            "timm model 'orthoact': expected the base and record of a converted checkpoint; give its folder"
        )
    if kwargs.get("features_only"):
        raise OrthoactError(
            "features_only is not available for converted timm models: load it whole, or revert it first"
        )
    cfg = pretrained_cfg if isinstance(pretrained_cfg, dict) or pretrained_cfg is None else pretrained_cfg.to_dict()
    cfg = None if cfg is None else {**cfg, "architecture": base}
    cache = kwargs.get("cache_dir")
    model = timm.create_model(
        base, pretrained=False, pretrained_cfg=cfg, pretrained_cfg_overlay=pretrained_cfg_overlay, **kwargs
    )
    install(model, orthoact, complete=True)
    if pretrained:
        load_pretrained(
            model,
            pretrained_cfg=model.pretrained_cfg,  # pyright: ignore
            num_classes=model.num_classes,  # pyright: ignore
            in_chans=kwargs.get("in_chans", 3),
            cache_dir=cache,
        )
        for name in orthoact["sites"]:
            check_tensors(name, model.get_submodule(name))  # pyright: ignore[reportArgumentType]
    attach_timm(model, orthoact)
    return model
