"""What each engine can take, one entry per engine and range of versions.

Sources: the change log and operators.md of onnx/onnx-tensorrt up to 10.15, NVIDIA/TensorRT's CHANGELOG for
11.0, and NVIDIA's ONNX opset guide for 11.x. Everything about TensorRT-RTX was measured with TensorRT-RTX
1.7.1; the tests measure it again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvexport.devices.versions import Version

TENSORRT_LOWERINGS = ("std24", "decomposed17")  # the forms of the graph meant for TensorRT, best first


@dataclass(frozen=True)
class EngineCapabilities:
    """What one engine takes, from one version until the next entry of the same engine.

    Attributes:
        engine: "tensorrt", "tensorrt-rtx" or "onnxruntime".
        since: the first version with these capabilities.
        lowering: the best form of the graph that the engine imports: "std24", "decomposed17" or "ort".
        newest_opset: the newest opset that the parser reads; None: no opset is known to be too new.
        operators: operators of the default domain that the parser imports; None: all.
        undeclared_opset: imports operators that are newer than the opset the graph declares.
        float4: takes tensors of dtype FLOAT4E2M1.
        attention_any_rank: Attention takes Q, K, V and attn_mask of other ranks than 4.
        qk_matmul_output_mode: Attention may have this attribute.
        int32_positions: RotaryEmbedding takes position_ids of INT32.
        any_scales: DequantizeLinear takes scales of any sign, constant or not; INT8 also in blocks, INT4 also
            without.
        ahead_of_time: builds for other GPUs than this machine's.
        compatible_plans: builds version-compatible and hardware-compatible plans.
        timing_cache: a build gives a timing cache for the next build.
    """

    engine: str
    since: Version
    lowering: str
    newest_opset: int | None
    operators: frozenset[str] | None
    undeclared_opset: bool = False
    float4: bool = False
    attention_any_rank: bool = False
    qk_matmul_output_mode: bool = False
    int32_positions: bool = False
    any_scales: bool = False
    ahead_of_time: bool = False
    compatible_plans: bool = False
    timing_cache: bool = False

    def imports(self, operator: str) -> bool:
        """Whether the parser imports an operator of the default domain."""
        return self.operators is None or operator in self.operators


_OPERATORS_10_3 = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike
    Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace
    DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual
    GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN
    LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul
    Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or
    PRelu Pad Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range
    Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round Scan Scatter ScatterElements
    ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split
    Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""


def _tensorrt() -> tuple[EngineCapabilities, ...]:
    """TensorRT from 10.3 (JetPack 6.1), the oldest supported version. Each entry adds to the one before."""
    # operators.md of 10.0 names opset 20, and INT4, which ONNX has since opset 21: not measured. 10.6 and
    # 10.11 moved to ONNX 1.17 and 1.18; 10.15 and 11.0 document their opsets.
    entries = [
        EngineCapabilities(
            engine="tensorrt",
            since=(10, 3),
            lowering="decomposed17",
            newest_opset=21,
            operators=frozenset(_OPERATORS_10_3.split()),
            compatible_plans=True,
            timing_cache=True,
        )
    ]

    def add(since: Version, *operators: str, **changes: Any) -> None:
        last = entries[-1]
        assert last.operators is not None
        entries.append(replace(last, since=since, operators=last.operators | {*operators}, **changes))

    add((10, 4), "BlackmanWindow", "HammingWindow", "HannWindow")
    add((10, 5), "STFT")
    add((10, 6), newest_opset=22)
    add((10, 8), float4=True)
    add((10, 11), newest_opset=23)
    add((10, 14), "Attention")
    add((10, 15), "RotaryEmbedding", "RMSNormalization", "TensorScatter", newest_opset=24, lowering="std24")
    add((11, 0), "Swish", newest_opset=25)
    return tuple(entries)


def _tensorrt_rtx(newest: EngineCapabilities) -> EngineCapabilities:
    """TensorRT-RTX 1.7.1, whose parser is that of TensorRT 11 and takes more than it."""
    assert newest.operators is not None
    return EngineCapabilities(
        engine="tensorrt-rtx",
        since=(1, 0),
        lowering="std24",
        newest_opset=None,
        operators=newest.operators - {"DeformConv"} | {"CausalConvWithState", "LinearAttention"},
        undeclared_opset=True,
        float4=True,
        attention_any_rank=True,
        qk_matmul_output_mode=True,
        int32_positions=True,
        any_scales=True,
        ahead_of_time=True,
    )


_TENSORRT = _tensorrt()
CAPABILITIES = (
    *_TENSORRT,
    _tensorrt_rtx(_TENSORRT[-1]),
    EngineCapabilities("onnxruntime", since=(1, 0), lowering="ort", newest_opset=None, operators=None),
)
OLDEST_TENSORRT = _TENSORRT[0].since


def capabilities_of(engine: str, version: Version | None = None) -> EngineCapabilities:
    """The capabilities of a version of an engine.

    Args:
        engine: "tensorrt", "tensorrt-rtx" or "onnxruntime".
        version: such as (10, 3, 0, 30); a version older than all entries gets the oldest; None: the newest.
    """
    entries = [entry for entry in CAPABILITIES if entry.engine == engine]
    matching = [entry for entry in entries if version is None or version >= entry.since]
    return matching[-1] if matching else entries[0]


def first_tensorrt_with(operator: str) -> Version | None:
    """The first version of TensorRT whose parser imports an operator; None: no version does."""
    return next((entry.since for entry in _TENSORRT if entry.imports(operator)), None)
