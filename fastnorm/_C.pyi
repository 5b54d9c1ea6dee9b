"""The compiled extension. Importing it registers the operators of `torch.ops.fastnorm` (see ops.py)."""

from collections.abc import Mapping

def build_info() -> dict[str, str]:
    """The version, torch, compiler, instruction sets and CUDA ("none", or as "13.0 sm_80 sm_90") of this build."""

def cpu_capability() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline"."""

def cpu_capabilities() -> list[str]:
    """The instruction sets that this build and this processor can both run, best first."""

def refused_gangs() -> int:
    """How many CUDA launches whose blocks wait for each other were refused, as a shared or partitioned GPU does, and
    replaced by slower plans. FASTNORM_STRICT=1 makes a refusal a RuntimeError; FASTNORM_LOG=fallback prints it."""

def has_stream() -> bool:
    """Whether the torch that is loaded has CUDA streams."""

def activations() -> list[str]:
    """The names of the ops' `activation` argument: number i is the name at i. The first is "none"."""

def two_sided_activations() -> list[str]:
    """Those whose derivative is one of two constants, so that one bit an element tells it: the mask."""

def make_eager_norm(op: object) -> object:
    """`op`, the `_op` of the operator `norm`, with plain tensors and numbers passed on as they are. They come in order,
    none is left out."""

def set_aten_switch(norm: str, device: str, on: bool) -> None:
    """Whether our kernels answer aten's own operators of a norm ("batch_norm", "group_norm", "layer_norm") on a device
    ("cpu", "cuda")."""

def aten_switches() -> list[tuple[str, str, bool, int, dict[str, int]]]:
    """For each norm and device: the names, whether the switch is on, calls served, calls left to torch by reason."""

STATS_ROWS: int
MAX_IMAGE_CHANNELS: int
"""Rows of an op's `stats`: mean, rstd, biased variance, what rounding cut off the mean."""

def plan(
    kind: str,
    N: int,
    C: int,
    S: int,
    groups: int,
    channels_last: bool,
    dtype: str,
    streams: int,
    l2_bytes: int,
    l3_bytes: int,
    threads: int,
    outputs: int = 1,
) -> str:
    """How a call on the CPU, on (N, C, S), is cut into tasks, on one line."""

class Geometry:
    """The sets that a norm of `kind` ("batch", "group" or "layer") reduces over in (N, C, S); str: on one line."""

    def __init__(self, kind: str, N: int, C: int, S: int, groups: int = 1, channels_last: bool = False) -> None: ...
    @property
    def kind(self) -> str: ...
    @property
    def N(self) -> int: ...
    @property
    def C(self) -> int: ...
    @property
    def S(self) -> int: ...
    @property
    def G(self) -> int: ...
    @property
    def channels_last(self) -> bool: ...
    @property
    def D(self) -> int: ...
    @property
    def numel(self) -> int: ...
    @property
    def sets(self) -> int: ...
    @property
    def set_size(self) -> int: ...
    @property
    def set_channels(self) -> int: ...
    @property
    def per_element(self) -> bool: ...
    @property
    def traversal(self) -> str: ...
    @property
    def mask_run(self) -> int: ...
    @property
    def outer(self) -> int: ...
    @property
    def positions(self) -> int: ...

class DeviceInfo:
    """The facts about a GPU that plans are made from: csrc/plan/types.h. capability: 90 for sm_90."""

    def __init__(
        self,
        capability: int,
        num_sms: int,
        clock_mhz: int,
        threads_per_sm: int,
        shared_per_sm: int,
        shared_per_block: int,
        l2_bytes: int,
        bytes_per_us: int,
        largest_cluster: int,
        cluster_sms: int,
        cooperative: bool,
        cooperative_clusters: bool,
    ) -> None: ...
    @property
    def capability(self) -> int: ...
    @property
    def num_sms(self) -> int: ...
    @property
    def clock_mhz(self) -> int: ...
    @property
    def threads_per_sm(self) -> int: ...
    @property
    def shared_per_sm(self) -> int: ...
    @property
    def shared_per_block(self) -> int: ...
    @property
    def l2_bytes(self) -> int: ...
    @property
    def bytes_per_us(self) -> int: ...
    @property
    def largest_cluster(self) -> int: ...
    @property
    def cluster_sms(self) -> int: ...
    @property
    def cooperative(self) -> bool: ...
    @property
    def cooperative_clusters(self) -> bool: ...

class Estimate:
    """The microseconds that the planner expects of a plan: csrc/plan/types.h."""

    @property
    def memory(self) -> float: ...
    @property
    def issue(self) -> float: ...
    @property
    def barriers(self) -> float: ...
    @property
    def launches(self) -> float: ...
    @property
    def total(self) -> float: ...

class Grid:
    """One CUDA launch: csrc/plan/types.h."""

    @property
    def traversal(self) -> str: ...
    @property
    def pack(self) -> int: ...
    @property
    def threads_x(self) -> int: ...
    @property
    def threads_y(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def pieces(self) -> int: ...
    @property
    def piece_runs(self) -> int: ...
    @property
    def piece_length(self) -> int: ...
    @property
    def tile(self) -> int: ...
    @property
    def items(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def team_bytes(self) -> int: ...
    @property
    def gang(self) -> str: ...
    @property
    def stages(self) -> int: ...
    @property
    def staged_length(self) -> int: ...
    @property
    def exchange(self) -> str: ...
    @property
    def thread_packs(self) -> int: ...

class Units:
    """The units with which fused rows add up the cells of a set: csrc/plan/types.h."""

    @property
    def threads(self) -> int: ...
    @property
    def segments(self) -> int: ...
    @property
    def length(self) -> int: ...

class ForwardPlan:
    """How a forward call is cut into CUDA launches; strategy: "fused", "split" or "apply". str gives it on one line."""

    @property
    def strategy(self) -> str: ...
    @property
    def grid(self) -> Grid: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def launches(self) -> int: ...
    @property
    def estimate(self) -> Estimate: ...

class BackwardPlan:
    """How a backward call is cut into CUDA launches; param_sums: "none", "from_cells", "in_gang" or "own_launch"."""

    @property
    def strategy(self) -> str: ...
    @property
    def param_sums(self) -> str: ...
    @property
    def cells(self) -> Geometry: ...
    @property
    def reduce(self) -> Grid: ...
    @property
    def apply(self) -> Grid: ...
    @property
    def params(self) -> Grid: ...
    @property
    def units(self) -> Units: ...
    @property
    def sums_bytes(self) -> int: ...
    @property
    def params_bytes(self) -> int: ...
    @property
    def terms_bytes(self) -> int: ...
    @property
    def gang_bytes(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def grid_sync(self) -> bool: ...
    @property
    def launches(self) -> int: ...
    @property
    def estimate(self) -> Estimate: ...

def plan_forward(
    geometry: Geometry,
    dtype: str,
    device: DeviceInfo,
    *,
    alignment: int = 16,
    output: bool = True,
    frozen: bool = False,
    residual: bool = False,
    activation: str = "none",
    forced: Mapping[str, str | int] = {},
    free_sms: int = 0,
) -> ForwardPlan:
    """The cheapest plan of a forward call. dtype: "float32", "bfloat16", ...; forced: requirements on strategy, gang,
    pieces, stages, blocks_per_sm, tile_bytes, place ("registers" or "shared"), staged_length, exchange ("gather" or
    "scatter") and traversal ("rows" or "columns"), as csrc/plan/types.h has them.
    ValueError for a geometry of no elements, and where no plan is as forced."""

def plan_backward(
    geometry: Geometry,
    dtype: str,
    device: DeviceInfo,
    *,
    alignment: int = 16,
    residual: bool = False,
    mask: bool = False,
    frozen: bool = False,
    input: bool = True,
    dresidual: bool = False,
    params: bool = True,
    activation: str = "none",
    forced: Mapping[str, str | int] = {},
    free_sms: int = 0,
) -> BackwardPlan:
    """The cheapest plan of a backward call. residual: it is read again; mask: forward has left one; input: dx or
    dresidual is wanted; dresidual: besides dx; params: the gradient of weight or bias is wanted."""

def compare_forward(
    geometry: Geometry,
    dtype: str,
    device: DeviceInfo,
    *,
    alignment: int = 16,
    output: bool = True,
    frozen: bool = False,
    residual: bool = False,
    activation: str = "none",
    forced: Mapping[str, str | int] = {},
    free_sms: int = 0,
) -> list[ForwardPlan]:
    """All plans of a forward call, cheapest first."""

def compare_backward(
    geometry: Geometry,
    dtype: str,
    device: DeviceInfo,
    *,
    alignment: int = 16,
    residual: bool = False,
    mask: bool = False,
    frozen: bool = False,
    input: bool = True,
    dresidual: bool = False,
    params: bool = True,
    activation: str = "none",
    forced: Mapping[str, str | int] = {},
    free_sms: int = 0,
) -> list[BackwardPlan]:
    """All plans of a backward call, cheapest first."""

def set_plan_options(*, forced: Mapping[str, str | int] = {}, free_sms: int = 0) -> None:
    """Sets what all CUDA calls from now on are planned with. `forced` is for tests and tuning."""

def cuda_device_info(index: int = 0) -> DeviceInfo:
    """The facts of a GPU of this machine; RuntimeError where there is none, or no kernels for any."""

def pack_width(geometry: Geometry, dtype: str, alignment: int = 16) -> int:
    """Elements of the widest access that divides every run and keeps every address aligned."""
