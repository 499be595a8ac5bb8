"""Models of mmrag among those that mteb finds by name."""

from __future__ import annotations

from typing import Any

from mteb.models import ModelMeta
from mteb.models.model_implementations import MODEL_REGISTRY

from mmrag.errors import ConfigError
from mmrag.evaluation.mteb_encoder import MTEBEncoder


def register(encoder: MTEBEncoder) -> ModelMeta:
    """Have mteb find an encoder by its name, until the process ends.

    ``mteb.get_model`` then gives one over the same embedder, with ``embed_dim`` of fewer
    dimensions, and ``mteb.evaluate`` takes the metadata in place of the encoder. The embedder
    stays on the device where it was loaded, whichever mteb names. A model of mteb with the same
    name is no longer found.

    Returns:
        The metadata that ``mteb.get_model_meta`` gives from now on. Results are filed as those of
        the encoder itself are: by its name, and by the fingerprint of what was loaded.

    Examples:
        >>> import mteb
        >>> from mmrag import UniversalEmbedding
        >>> meta = register(MTEBEncoder(UniversalEmbedding("mmrag-nano", device="cpu")))
        >>> mteb.get_model("mmrag/mmrag-nano", embed_dim=64).dim
        64
    """
    known = encoder.mteb_model_meta

    # mteb's wrappers write into the metadata of a model, so each call makes an encoder.
    def load_mmrag(embed_dim: int | None) -> MTEBEncoder:
        return MTEBEncoder(
            encoder.embedder,
            dim=encoder.dim if embed_dim is None else embed_dim,
            instructions=encoder.instructions,
            name=known.name,
        )

    meta = _Registered(**{**dict(known), "loader": load_mmrag})
    MODEL_REGISTRY[known.name] = meta
    return meta


class _Registered(ModelMeta):  # type: ignore[misc]
    def load_model(
        self, device: str | None = None, *, embed_dim: int | None = None, **options: Any
    ) -> MTEBEncoder:
        """What ``mteb.get_model`` gives; see ``register``."""
        # mteb's own method would ask for torchvision, which mmrag does without, and put this
        # object in place of the encoder's metadata.
        if options:
            raise ConfigError(
                f"{', '.join(options)}: {self.name} is loaded already; give load_embedder these."
            )
        encoder: MTEBEncoder = self.loader(embed_dim)
        return encoder
