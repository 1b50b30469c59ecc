"""Names of slimtune. Made by `python -m slimtune.testing.stub --write`; do not edit."""

from collections.abc import Iterable, Mapping

from slimtune.algebra.combine import combine as combine
from slimtune.algebra.combine import reduce as reduce
from slimtune.algebra.convert import convert as convert
from slimtune.algebra.extract import extract as extract
from slimtune.algebra.merge import merge as merge
from slimtune.algebra.merge import unmerge as unmerge
from slimtune.core.attach import attach as attach
from slimtune.core.attach import detach as detach
from slimtune.core.attach import disabled as disabled
from slimtune.core.attach import keep_plan as keep_plan
from slimtune.core.attach import param_groups as param_groups
from slimtune.core.attach import report as report
from slimtune.core.attach import trainable as trainable
from slimtune.core.attach import use as use
from slimtune.core.errors import CapabilityError as CapabilityError
from slimtune.core.errors import DataError as DataError
from slimtune.core.errors import FileError as FileError
from slimtune.core.errors import FormatError as FormatError
from slimtune.core.errors import InternalsError as InternalsError
from slimtune.core.errors import InvalidName as InvalidName
from slimtune.core.errors import MergeError as MergeError
from slimtune.core.errors import MismatchError as MismatchError
from slimtune.core.errors import NameInUse as NameInUse
from slimtune.core.errors import NoSuchAdapter as NoSuchAdapter
from slimtune.core.errors import PlanError as PlanError
from slimtune.core.errors import RecipeError as RecipeError
from slimtune.core.errors import ReportError as ReportError
from slimtune.core.errors import SiteError as SiteError
from slimtune.core.errors import SlimtuneError as SlimtuneError
from slimtune.core.errors import SpecError as SpecError
from slimtune.core.errors import TargetError as TargetError
from slimtune.core.registry import methods as methods
from slimtune.core.registry import register as register
from slimtune.core.report import Report as Report
from slimtune.core.spec import Spec as Spec
from slimtune.core.tasks import tasks as tasks
from slimtune.core.view import adapters as adapters
from slimtune.files.adapter import load as load
from slimtune.files.adapter import save as save
from slimtune.methods.adalora import AdaLoRA as _AdaLoRA
from slimtune.methods.bitfit import BitFit as _BitFit
from slimtune.methods.bottleneck import Bottleneck as _Bottleneck
from slimtune.methods.compacter import Compacter as _Compacter
from slimtune.methods.delta_lora import DeltaLoRA as _DeltaLoRA
from slimtune.methods.dense import Dense as _Dense
from slimtune.methods.dora import DoRA as _DoRA
from slimtune.methods.gated import Gated as _Gated
from slimtune.methods.houlsby import Houlsby as _Houlsby
from slimtune.methods.ia3 import IA3 as _IA3
from slimtune.methods.ln_tuning import LayerNormTuning as _LayerNormTuning
from slimtune.methods.lora import LoRA as _LoRA
from slimtune.methods.mam import MAM as _MAM
from slimtune.methods.mora import MoRA as _MoRA
from slimtune.methods.multitask_prompt import MultitaskPromptTuning as _MultitaskPromptTuning
from slimtune.methods.p_tuning import PTuning as _PTuning
from slimtune.methods.p_tuning_v2 import PTuningV2 as _PTuningV2
from slimtune.methods.parallel import Parallel as _Parallel
from slimtune.methods.prefix_tuning import PrefixTuning as _PrefixTuning
from slimtune.methods.progressive import ProgressiveLoRA as _ProgressiveLoRA
from slimtune.methods.prompt_tuning import PromptTuning as _PromptTuning
from slimtune.methods.qa_lora import QALoRA as _QALoRA
from slimtune.methods.trainable_tokens import TrainableTokens as _TrainableTokens
from slimtune.methods.union import Union as _Union
from slimtune.methods.unipelt import UniPELT as _UniPELT
from slimtune.methods.vera import VeRA as _VeRA
from slimtune.ports.group_quantised import quantise as quantise
from slimtune.savers import lean as lean
from slimtune.savers import unlean as unlean
from slimtune.savers.trunk import cache_trunk as cache_trunk
from slimtune.train.vocabulary import add_tokens as add_tokens
from slimtune.version import __version__ as __version__

class AdaLoRA(_AdaLoRA):
    """Adaptive budget allocation (arXiv 2303.10512): the sites that need it get more rank, by themselves, in any training loop."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "all-linear",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        init_r: int = 12,
        target_r: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        t_init: int | float = 0.1,
        t_final: int | float = 0.4,
        delta_t: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonality: float = 0.5,
        total_steps: int | None = None,
    ) -> None: ...

class BitFit(_BitFit):
    """Train biases only (arXiv 2106.10199)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = ...,
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        missing: str = "auto",
    ) -> None: ...

class Bottleneck(_Bottleneck):
    """Bottleneck adapters after each feed-forward (Pfeiffer, arXiv 2005.00247)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "down",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        reduction: float = 16,
        nonlinearity: str = "relu",
        norm: str = "none",
        scale: float = 1.0,
        train_scale: bool = False,
        dropout: float = 0.0,
    ) -> None: ...

class Compacter(_Compacter):
    """Low-rank hypercomplex adapters (arXiv 2106.04647)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = ...,
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        reduction: float = 16,
        nonlinearity: str = "gelu_tanh",
        norm: str = "none",
        scale: float = 1.0,
        train_scale: bool = False,
        dropout: float = 0.0,
        n: int = 4,
        rank: int = 1,
    ) -> None: ...

class DeltaLoRA(_DeltaLoRA):
    """A LoRA whose steps also move the base's weight (arXiv 2309.02411), at no cost in gradients and without touching the base."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "all-linear",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        r: int = 8,
        alpha: float | None = None,
        rank_stabilised: bool = False,
        dropout: float = 0.0,
        dropout_kind: str = "element",
        freeze: str = "none",
        init: str = "kaiming",
        init_batches: int = 8,
        rho: float = 2.0,
        up_bias: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        loftq_source: str | None = None,
        ratio: float = 0.5,
        start: int = 100,
    ) -> None: ...

class Dense(_Dense):
    """Train whole modules, as a delta to the base."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "head",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
    ) -> None: ...

class DoRA(_DoRA):
    """Weight-decomposed adaptation (arXiv 2402.09353) of an additive method."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] | None = None,
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        of: Spec | type[Spec] | str = ...,
    ) -> None: ...

class Gated(_Gated):
    """A trained gate on what another method contributes (arXiv 2110.07577)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] | None = None,
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        of: Spec | type[Spec] | str = ...,
    ) -> None: ...

class Houlsby(_Houlsby):
    """Bottleneck adapters after each attention and each feed-forward (arXiv 1902.00751)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = ...,
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        reduction: float = 16,
        nonlinearity: str = "gelu",
        norm: str = "none",
        scale: float = 1.0,
        train_scale: bool = False,
        dropout: float = 0.0,
    ) -> None: ...

class IA3(_IA3):
    """Infused adapters by inhibiting and amplifying inner activations (arXiv 2205.05638)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = ...,
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        feedforward: Iterable[str] = ...,
    ) -> None: ...

class LayerNormTuning(_LayerNormTuning):
    """Train the norms (arXiv 2312.11420)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "norm",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
    ) -> None: ...

class LoRA(_LoRA):
    """Low-rank adaptation (arXiv 2106.09685)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "all-linear",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        r: int = 8,
        alpha: float | None = None,
        rank_stabilised: bool = False,
        dropout: float = 0.0,
        dropout_kind: str = "element",
        freeze: str = "none",
        init: str = "kaiming",
        init_batches: int = 8,
        rho: float = 2.0,
        up_bias: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        loftq_source: str | None = None,
    ) -> None: ...

class MAM(_MAM):
    """Mix-and-match adapter: prefix and scaled parallel adapters (arXiv 2110.04366)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] | None = None,
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        of: Iterable[Spec | type[Spec] | str] = ...,
    ) -> None: ...

class MoRA(_MoRA):
    """High-rank updating with one square matrix per layer (arXiv 2405.12130)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "all-linear",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        r: int = 8,
        form: str = "rotation",
    ) -> None: ...

class MultitaskPromptTuning(_MultitaskPromptTuning):
    """A shared prompt and a factor of low rank for each task (arXiv 2303.02861)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "auto",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        tokens: int = 20,
        keep: bool = False,
        decoder: bool = False,
        width: int | None = None,
        seed: int = 0,
        init: str = "random",
        init_text: str | Iterable[int] | None = None,
        tokenizer: str | None = None,
        tasks: int = 1,
        r: int = 1,
    ) -> None: ...

class PTuning(_PTuning):
    """Virtual tokens made by a small network (arXiv 2103.10385)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "auto",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        tokens: int = 20,
        keep: bool = False,
        decoder: bool = False,
        width: int | None = None,
        seed: int = 0,
        encoder: str = "mlp",
        hidden: int | None = None,
        encoder_layers: int = 2,
        dropout: float = 0.0,
    ) -> None: ...

class PTuningV2(_PTuningV2):
    """Deep prompts and a trained head, for classifying sequences and tokens (arXiv 2110.07602)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "attention",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        p: int = 20,
        hidden: int = 0,
        std: float = 1.0,
        seed: int = 0,
        where: Iterable[str] = ...,
    ) -> None: ...

class Parallel(_Parallel):
    """Bottleneck adapters beside each feed-forward, from its input (arXiv 2110.04366)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "down",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        reduction: float = 16,
        nonlinearity: str = "relu",
        norm: str = "none",
        scale: float = 4.0,
        train_scale: bool = False,
        dropout: float = 0.0,
    ) -> None: ...

class PrefixTuning(_PrefixTuning):
    """Keys and values in front of every attention layer's own (arXiv 2101.00190)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "attention",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        p: int = 20,
        hidden: int = 0,
        std: float = 1.0,
        seed: int = 0,
        where: Iterable[str] = ...,
    ) -> None: ...

class ProgressiveLoRA(_ProgressiveLoRA):
    """A LoRA that gains directions while it trains, or loses them."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "all-linear",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        r: int = 4,
        alpha: float | None = None,
        rank_stabilised: bool = False,
        dropout: float = 0.0,
        dropout_kind: str = "element",
        freeze: str = "none",
        init: str = "kaiming",
        init_batches: int = 8,
        rho: float = 2.0,
        up_bias: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        loftq_source: str | None = None,
        by: int = 4,
        max_r: int = 16,
        every: int = 100,
        patience: int = 0,
        shrink_at: int = 0,
        energy: float = 0.99,
        seed: int = 0,
    ) -> None: ...

class PromptTuning(_PromptTuning):
    """Trained virtual tokens in front of the input (arXiv 2104.08691)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "auto",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        tokens: int = 20,
        keep: bool = False,
        decoder: bool = False,
        width: int | None = None,
        seed: int = 0,
        init: str = "random",
        init_text: str | Iterable[int] | None = None,
        tokenizer: str | None = None,
    ) -> None: ...

class QALoRA(_QALoRA):
    """Quantisation-aware low-rank adaptation (arXiv 2309.14717)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "all-linear",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        r: int = 8,
        alpha: float | None = None,
        group: int | None = None,
        pool: str = "sum",
        dropout: float = 0.0,
    ) -> None: ...

class TrainableTokens(_TrainableTokens):
    """Train the rows of chosen tokens, in the table and in the head tied to it."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = ...,
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        tokens: Iterable[int] | None = None,
        head: str = "tied",
    ) -> None: ...

class UniPELT(_UniPELT):
    """Gated LoRA, prefix and bottleneck adapter in one (arXiv 2110.07577)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] | None = None,
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        of: Iterable[Spec | type[Spec] | str] = ...,
    ) -> None: ...

class Union(_Union):
    """Several methods as one adapter."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] | None = None,
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        of: Iterable[Spec | type[Spec] | str] = ...,
    ) -> None: ...

class VeRA(_VeRA):
    """Vector-based random matrix adaptation (arXiv 2310.11454)."""

    def __init__(
        self,
        *,
        targets: str | Iterable[str] = "all-linear",
        layers: str | int | Iterable[int] | None = None,
        exclude: str | Iterable[str] | None = ...,
        train_modules: str | Iterable[str] | None = "auto",
        r: int = 256,
        d_start: float = 0.1,
        seed: int = 0,
        dropout: float = 0.0,
    ) -> None: ...
