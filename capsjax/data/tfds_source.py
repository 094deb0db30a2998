"""Loads data sets from TFDS without TensorFlow.

TFDS reads prepared sets without TensorFlow, but its stock builders need TensorFlow to read the
original files and to encode PNG. The builders in this file do both in Python and write the same
data set, with the same name, version and order of records.
"""

import contextlib
import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from capsjax.data.absl_log import without_warnings
from capsjax.data.dataset import Dataset, Split
from capsjax.data.decoded_cache import cached
from capsjax.data.originals import ORIGINALS
from capsjax.data.tasks import Cropped, Shifted, Task
from capsjax.errors import DataError, how_to_install

NAMES = tuple(ORIGINALS)

# Preprocessing as in Sabour et al. 2017; images of all other sets are shifted.
_TASKS: dict[str, Task] = {
    "cifar10": Cropped(24),
    "svhn_cropped": Shifted(0),
    "smallnorb": Cropped(32),
}
_FORMAT = "array_record"
_CHUNK = 1000
_PROBE_SECONDS = 10.0

# Held while a class of TFDS is changed; see only_own_features.
_patching = threading.RLock()
_log = logging.getLogger(__name__)


def load_tfds(name: str, data_dir: Path | None, *, download: bool) -> Dataset:
    """Loads a data set, preparing it first if needed.

    Args:
      name: one of :data:`NAMES`.
      data_dir: TFDS's data directory; its default when None.
      download: whether to download and prepare the set if it is missing.

    Returns:
      The decoded data set.

    Raises:
      DataError: TFDS is not installed; the set is damaged or has another format; or it is missing
        and cannot be prepared.
    """
    tfds = import_tfds()
    data_dir = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if data_dir.exists() and not data_dir.is_dir():
        raise DataError(f"data set {name}: data directory {data_dir} is a file")
    _expect_format(name, data_dir / name / str(tfds.builder_cls(name).VERSION))
    try:
        with only_own_features(tfds):
            builder = _builder_class(tfds, name)(data_dir=data_dir, file_format=_FORMAT)
    except DataError:
        raise
    except Exception as error:  # a damaged dataset_info.json raises many kinds
        raise _unreadable(name, data_dir / name, error) from None
    prepared = Path(builder.data_dir)
    if not (prepared / "dataset_info.json").exists():
        _prepare(tfds, builder, name, data_dir, download)
    try:
        train, test = cached(prepared, f"{name}-{builder.version}", lambda: _decode(builder))
    except DataError:
        raise
    except Exception as error:  # array_record, Pillow and TFDS raise many kinds
        raise _unreadable(name, prepared, error) from None
    return Dataset(name, train, test, _class_names(builder), task_of(name))


def task_of(name: str) -> Task:
    """Returns the task of a set, which makes the network's inputs from its images."""
    return _TASKS.get(name, Shifted())


def _class_names(builder: Any) -> tuple[str, ...]:
    features = builder.info.features
    return tuple(features["label" if "label" in features else "label_category"].names)


def _expect_format(name: str, prepared: Path) -> None:
    """Raises a DataError for a set in another format; TFDS would report it as damaged."""
    try:
        info = json.loads((prepared / "dataset_info.json").read_text())
        found = info.get("fileFormat", "tfrecord")
    except FileNotFoundError:
        return
    except Exception as error:  # unreadable, or not a JSON object
        raise _unreadable(name, prepared, error) from None
    if found != _FORMAT:
        raise DataError(
            f"data set {name} in {prepared} is prepared as {found}, expected {_FORMAT};"
            " pass another directory as --data-dir to have it prepared there"
        )


def _decode(builder: Any) -> tuple[Split, Split]:
    with without_warnings():  # TFDS logs advice to install OpenCV
        train, test = (_decode_split(builder, split) for split in ("train", "test"))
    return train, test


def _decode_split(builder: Any, split: str) -> Split:
    source = builder.as_data_source(split=split)
    number = builder.info.splits[split].num_examples
    if len(source) != number:
        raise ValueError(f"{split} holds {len(source)} records, expected {number}")
    _log.info(
        "decoding %s %s, %s images; the result is cached",
        builder.name,
        split,
        f"{number:,}",
    )
    images: list[np.ndarray] = []
    labels: list[Any] = []
    for first in range(0, number, _CHUNK):
        positions = range(first, min(first + _CHUNK, number))
        # Reading many records at once is several times faster than one by one.
        for record in source.__getitems__(positions):
            image, label = ORIGINALS[builder.name].example(record)
            images.append(image)
            labels.append(label)
    return Split(np.stack(images), np.array(labels, np.int32))


def _prepare(tfds: Any, builder: Any, name: str, data_dir: Path, download: bool) -> None:
    missing = f"data set {name} is not prepared in {data_dir}"
    if not data_dir.exists():
        missing += " (which does not exist)"
    elif versions := sorted(p.name for p in (data_dir / name).glob("*.*.*")):
        missing += f" (found version {', '.join(versions)}, expected {builder.version})"
    advice = (
        "prepare it on a machine with network access and pass its directory as --data-dir, or use"
        " --dataset mnist_5k, which needs no download"
    )
    if not download:
        raise DataError(f"{missing}, and downloading is disabled: {advice}")
    url = next(iter(ORIGINALS[name].urls(builder)["train"].values()))
    if reason := _unreachable(url):
        raise DataError(f"{missing}, and {urlsplit(url).hostname} {reason}: {advice}")
    _log.info("downloading and preparing %s in %s", name, data_dir)
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(force_checksums_validation=True)
    try:
        # TFDS prints messages, which would break up a progress bar.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config, file_format=_FORMAT)
    except Exception as error:  # requests, TFDS and the file system raise many kinds
        text = " ".join(str(error).split())[:200]
        raise DataError(
            f"{missing}, and preparing it failed ({type(error).__name__}: {text}): {advice}"
        ) from None


def _unreachable(url: str) -> str | None:
    """Returns within seconds why a server cannot be reached, or None if it answers.

    TFDS itself retries for minutes. The request runs in a separate thread, because looking up a
    host name can hang and has no timeout.
    """
    import requests

    outcome: list[str | None] = []

    def probe() -> None:
        try:
            status = requests.head(
                url, timeout=_PROBE_SECONDS / 2, allow_redirects=True
            ).status_code
        except requests.RequestException as error:
            outcome.append(f"cannot be reached ({type(error).__name__})")
        else:
            # TFDS would retry after these statuses.
            outcome.append(f"answers with HTTP status {status}" if status >= 500 else None)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return outcome[0] if outcome else f"does not answer within {_PROBE_SECONDS:.0f} s"


def _builder_class(tfds: Any, name: str) -> Any:
    """Returns the stock builder with replacements for the steps that need TensorFlow."""
    stock: Any = tfds.builder_cls(name)
    originals = ORIGINALS[name]

    class TensorFlowFree(stock, skip_registration=True):  # type: ignore[misc,call-arg]
        """A builder that reads the original files and encodes PNG in Python."""

        VERSION = stock.VERSION
        # The checksums registered with TFDS, which would otherwise look for them beside this file.
        url_infos = stock.url_infos

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            paths = dl_manager.download(originals.urls(self))
            if names := originals.class_names(paths["train"]):
                self.info.features["label"].names = names
            return {split: self._generate_examples(files, split) for split, files in paths.items()}

        def _generate_examples(self, files: Any, split: str) -> Iterator[tuple[int, Any]]:
            return enumerate(originals.records(files, split))

    TensorFlowFree.name = stock.name
    TensorFlowFree.pkg_dir_path = getattr(stock, "pkg_dir_path", None)
    return TensorFlowFree


def import_tfds() -> Any:
    """Imports TFDS; raises a DataError if it is not installed."""
    try:
        import importlib_resources  # noqa: F401  needed by TFDS, which does not declare it
        import PIL  # noqa: F401  needed by TFDS to decode images
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"data set needs {error.name}, which is not installed: {how_to_install('data')}"
        ) from None
    return tfds


@contextlib.contextmanager
def only_own_features(tfds: Any) -> Iterator[None]:
    """Refuses features of other packages, whose modules TFDS would import where a set names them.

    The import would execute code that the set brings, or any other.
    """
    connector = tfds.features.FeatureConnector

    def checked(cls: type, name: str) -> Any:
        if not name.startswith("tensorflow_datasets."):
            raise DataError(f"the data set's features must be TFDS's own, got one of class {name}")
        return original.__func__(cls, name)

    with _patching:
        original = vars(connector)["cls_from_name"]
        connector.cls_from_name = classmethod(checked)
        try:
            yield
        finally:
            connector.cls_from_name = original


def _unreadable(name: str, path: Path, error: Exception) -> DataError:
    text = " ".join(str(error).split())[:200]
    return DataError(
        f"data set {name} in {path} is damaged or incomplete ({type(error).__name__}: {text});"
        " delete that folder to have it prepared again"
    )
