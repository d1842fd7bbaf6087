"""Lint: every rule on a graph that breaks it and on one that does not, compared with TensorRT-RTX."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from support.combinations import representatives
from support.lint_graphs import (
    INTEGER_CASES,
    OLDER_CASES,
    RTX,
    RTX_CASES,
    UNFUSED,
    WRONG,
    attention,
    dequantised,
    one,
)

from kvexport.graph.lint import Parser, find_unfused_attention, lint, refusals
from kvexport.graph.lint_rules import RULES, check_operator


@pytest.fixture(scope="module")
def rtx() -> Any:
    pytest.importorskip("tensorrt_rtx")
    from kvexport.engine.library import load_library

    return load_library("tensorrt-rtx")


def builds(library: Any, model: ir.Model) -> bool:
    """Whether TensorRT-RTX parses and builds a graph."""
    trt = library.trt
    builder = trt.Builder(library.log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library.log)
    if not parser.parse(ir.to_proto(model).SerializeToString()):
        return False
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for tensor in map(network.get_input, range(network.num_inputs)):
        if -1 in tuple(tensor.shape):
            profile.set_shape(
                tensor.name,
                *([size if size > 0 else some for size in tuple(tensor.shape)] for some in (1, 1, 2)),
            )
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("name", RTX_CASES)
def test_each_rule_reports_its_problem_and_nothing_else(name: str) -> None:
    case = RTX_CASES[name]
    found = refusals(lint(case.make(), RTX))
    if case.problem is None:
        assert found == []
    else:
        assert any(case.problem in finding.problem for finding in found)
        assert all(finding.node == "node" and finding.operator and finding.remedy for finding in found)


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", RTX_CASES)
def test_tensorrt_rtx_agrees_with_each_rule(name: str, rtx: Any) -> None:
    case = RTX_CASES[name]
    assert builds(rtx, case.make()) == (case.problem is None)


@pytest.mark.parametrize("name", UNFUSED)
def test_attention_without_a_fused_kernel_is_a_note(name: str) -> None:
    case = UNFUSED[name]
    (finding,) = lint(case.make(), RTX)
    assert finding.note and case.problem is not None and case.problem in finding.problem
    assert [node.name for node in find_unfused_attention(case.make(), RTX)] == ["node"]


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize("name", UNFUSED)
def test_tensorrt_rtx_builds_unfused_attention_only_with_the_attribute(name: str, rtx: Any) -> None:
    model = UNFUSED[name].make()
    assert not builds(rtx, model)
    for node in find_unfused_attention(model, RTX):
        node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
    assert builds(rtx, model)


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("width", "lead"), representatives((16, 24, 40, 64, 80, 96, 128, 200, 256), ("float16", "bfloat16"))
)
def test_tensorrt_rtx_has_a_fused_kernel_where_lint_has_no_note(width: int, lead: str, rtx: Any) -> None:
    dtype = getattr(onnx.TensorProto, lead.upper())
    model = attention((1, 4, "s", width), (1, 2, 32, width), dtype=dtype, mask=(1, 1, "s", 32))
    assert lint(model, RTX) == []
    assert builds(rtx, model)


@pytest.mark.parametrize("name", OLDER_CASES)
def test_documented_rules_of_other_versions(name: str) -> None:
    refusing, taking, case = OLDER_CASES[name]
    assert case.problem is not None
    assert any(
        case.problem in finding.problem + finding.remedy for finding in refusals(lint(case.make(), refusing))
    )
    if taking is not None:
        assert refusals(lint(case.make(), taking)) == []


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", OLDER_CASES)
def test_tensorrt_rtx_builds_what_other_versions_do_not(name: str, rtx: Any) -> None:
    model = OLDER_CASES[name][2].make()
    assert refusals(lint(model, RTX)) == []
    assert builds(rtx, model)


@pytest.mark.parametrize("version", [(10, 3), (10, 13, 3), (11, 4, 1)])
def test_integer_weights_of_every_form_are_taken_by_every_version(version: tuple[int, ...]) -> None:
    for model in (dequantised(opset=21), dequantised(onnx.TensorProto.INT4, block=32, opset=21)):
        assert refusals(lint(model, Parser("tensorrt", version))) == []


@pytest.mark.parametrize("name", INTEGER_CASES)
def test_full_tensorrt_has_the_rules_of_integer_weights_from_the_oldest_version_on(name: str) -> None:
    case = INTEGER_CASES[name]
    for version in ((10, 3), (10, 13, 3), (11, 4, 1)):
        found = refusals(lint(case.make(), Parser("tensorrt", version)))
        assert case.problem is not None and any(case.problem in finding.problem for finding in found)


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", WRONG)
def test_rejects_graphs_that_build_but_compute_wrong_results(name: str, rtx: Any) -> None:
    """TensorRT 11.1 and 11.2 compute nonpad_kv_seqlen wrongly in bfloat16; operators are imported by name."""
    case = WRONG[name]
    (finding,) = refusals(lint(case.make(), RTX))
    assert case.problem is not None and case.problem in finding.problem
    assert builds(rtx, case.make())


@pytest.mark.tensorrt
def test_operator_table_equals_the_parser_of_tensorrt_rtx(rtx: Any) -> None:
    trt = rtx.trt
    builder = trt.Builder(rtx.log)
    parser = trt.OnnxParser(builder.create_network(0), rtx.log)
    names = sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""})
    assert len(names) > 180
    for name in names:
        refused = any(check_operator(ir.node(name, []), RTX))
        assert refused == (not parser.supports_operator(name)), name


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    broken = set()
    for case in RTX_CASES.values():
        if case.problem is not None:
            broken |= {node.op_type for node in case.make().graph if node.name == "node"}
    reductions = {name for name in RULES if name.startswith("Reduce")} | {
        "Unsqueeze"
    }  # one rule for all of them
    assert RULES.keys() - reductions <= broken


def test_nodes_of_subgraphs_are_checked() -> None:
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("BitwiseNot", ["x"], ["y"], name="inside")],
        "inner",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, (4,))],
    )
    node = onnx.helper.make_node("If", ["which"], ["z"], name="outside", then_branch=inner, else_branch=inner)
    typed = onnx.helper.make_tensor_value_info
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node],
            "g",
            [typed("which", onnx.TensorProto.BOOL, ()), typed("x", onnx.TensorProto.INT32, (4,))],
            [typed("z", onnx.TensorProto.INT32, (4,))],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 24)],
    )
    assert {finding.node for finding in lint(ir.from_proto(model), RTX)} == {"inside"}


def test_an_unnamed_node_is_reported_by_its_output() -> None:
    model = one("BitwiseNot", onnx.TensorProto.INT32)
    model.graph[0].name = None
    (finding,) = lint(model, RTX)
    assert finding.node == "y"


def test_lint_needs_no_nvidia_package() -> None:
    packages = "('tensorrt', 'tensorrt_rtx', 'polygraphy', 'torch')"
    found = f"[name for name in sys.modules if name.split('.')[0] in {packages}]"
    script = f"import kvexport.graph.lint, kvexport.engine.engine_graph, sys; print({found})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_version_older_than_all_gets_the_oldest_limits() -> None:
    (finding,) = refusals(lint(one("Relu"), Parser("tensorrt", (10, 0))))
    assert "21 at most" in finding.problem
