"""Turn a GGUF file into a plain bfloat16 folder, once; reading the GGUF file itself takes as long every time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slimtune.core.errors import FileError, FormatError
from slimtune.train.fetch import cache_dir, cached, sha256


def convert_gguf(path: Path, say: Callable[[str], None]) -> Path:
    """Return a plain bfloat16 folder made of a GGUF file, from the cache if it was made before.

    Args:
        path: the .gguf file.
        say: called with one line of progress.

    Raises:
        FormatError: transformers cannot read the file.
        FileError: a package is missing, or the cache cannot be written.
    """
    folder = cache_dir() / "gguf" / f"{path.stem}-{sha256(path)[:12]}"

    def make(work: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        say(f"converting {path.name} to bfloat16 (once, less than a minute for a small model; kept in {folder})")
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
                model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16, trust_remote_code=False)
        except ImportError as error:
            raise FileError(f"reading a GGUF file needs one more package: {error}", where=str(path), hint="pip install gguf") from error
        except Exception as error:  # the readers raise anything from KeyError to struct.error on a damaged file
            raise FormatError(f"not a GGUF file that transformers can read: {error}", where=str(path)) from error
        # It was dequantised on reading; the note that it is quantised would make transformers do it again.
        model.hf_quantizer, model.is_quantized = None, False
        if "quantization_config" in vars(model.config):
            del model.config.quantization_config
        with quiet_transformers():
            model.save_pretrained(work)
        tokenizer.save_pretrained(work)

    cached(folder, make)
    return folder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence bars, and the report on weights that are new or unused: a classifier's new head is what was asked for."""
    from transformers.utils import logging as module

    logging: Any = module  # its functions have no types

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
