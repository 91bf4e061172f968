"""`cyflash check`: the errors are those of calls with these scales; the exit status says if they are small enough."""

import json
import re

import numpy as np
import pytest

from cyflash import cli, flash_attention_int8, reference
from cyflash.capture import save_capture
from cyflash.quant import LayerScales, Scales, compare, fixtures

OPTIONS = {"causal": True, "softcap": 20.0}


def layer(seed):
    return tuple(x[0] for x in fixtures.draw("normal", seed, H=3, Lq=40, Lk=60, D=16))


@pytest.fixture
def case(tmp_path):
    """(scales, file of two layers, their expected errors); b's scales are too large: its error is greater."""
    layers = {"layer2": layer(0), "layer10": layer(1)}
    scales = Scales({"layer2": LayerScales(0.03, 0.03, 0.03), "layer10": LayerScales(0.12, 0.12, 0.12)})
    errors = {
        name: compare(
            flash_attention_int8(*layers[name], quant=scales[name], **OPTIONS),
            reference.attention(*layers[name], **OPTIONS),
        )
        for name in layers
    }
    assert errors["layer2"].rel_l1 < 0.03 < errors["layer10"].rel_l1
    return scales.save(tmp_path / "s.safetensors"), save_capture(tmp_path / "x.npz", layers, **OPTIONS), errors


def check(scales, *more):
    return cli.main(["check", str(scales), "--data", *map(str, more)])


def test_the_errors_are_those_of_calls_with_these_scales(case, tmp_path, capsys):
    scales, data, errors = case
    numbers = tmp_path / "x.json"
    assert check(scales, data, "--max-rel-l1", "1", "--json", numbers) == 0
    report = json.loads(numbers.read_text())
    assert report["ok"] and report["limits"] == {"rel_l1": 1.0, "worst_row": None} and report["unchecked"] == []
    assert [row["layer"] for row in report["layers"]] == ["layer2", "layer10"]
    for row in report["layers"]:
        assert {name: row[name] for name in errors[row["layer"]]._fields} == errors[row["layer"]]._asdict()
    printed = capsys.readouterr().out
    for name, error in errors.items():
        cells = next(line.split() for line in printed.splitlines() if line.startswith(name))
        assert cells == [name, *(f"{x:.4f}" for x in (error.rel_l1, error.worst_head, error.worst_row)), "1", "yes"]
    assert "all 2 within the limit" in printed


@pytest.mark.parametrize("measure", ["rel_l1", "worst_row"])
def test_limits_are_inclusive_and_decide_the_exit_status(case, capsys, measure):
    scales, data, errors = case
    largest = max(getattr(error, measure) for error in errors.values())
    option = ["--max-rel-l1"] if measure == "rel_l1" else ["--max-rel-l1", "9", "--max-worst-row"]
    assert check(scales, data, *option, repr(largest)) == 0
    assert check(scales, data, *option, repr(np.nextafter(largest, 0).item())) == 1
    printed = capsys.readouterr().out
    assert printed.count(" NO") == 1 and "1 of 2 above the limit" in printed


def test_by_default_the_limit_is_two_hundredths(case, tmp_path, capsys):
    scales, data, errors = case
    numbers = tmp_path / "x.json"
    assert check(scales, data, "--json", numbers) == 1
    report = json.loads(numbers.read_text())
    assert report["limits"]["rel_l1"] == 0.02 and not report["ok"]
    assert [row["ok"] for row in report["layers"]] == [error.rel_l1 <= 0.02 for error in errors.values()]


def test_options_of_the_command_line_win(case, capsys, tmp_path):
    scales, data, errors = case
    numbers = tmp_path / "x.json"
    check(scales, data, "--no-causal", "--softcap", "0", "--json", numbers)
    row = json.loads(numbers.read_text())["layers"][0]
    q, k, v = layer(0)
    plain = compare(flash_attention_int8(q, k, v, quant=Scales.load(scales)["layer2"]), reference.attention(q, k, v))
    assert row["rel_l1"] == plain.rel_l1 != errors["layer2"].rel_l1


def test_a_planned_layer(tmp_path, capsys):
    q, k, v = layer(0)
    planned = LayerScales(parts=[([0, 2], LayerScales(0.03, 0.03, 0.03)), ([1], None)])
    scales = Scales({"x": planned}).save(tmp_path / "s.safetensors")
    numbers = tmp_path / "x.json"
    assert check(scales, save_capture(tmp_path / "x.npz", (q, k, v)), "--max-rel-l1", 0.05, "--json", numbers) == 0
    expected = compare(flash_attention_int8(q, k, v, quant=planned), reference.attention(q, k, v))
    assert json.loads(numbers.read_text())["layers"][0]["rel_l1"] == expected.rel_l1


def test_several_files_and_layers_without_data(case, tmp_path, capsys):
    scales, data, _ = case
    other = save_capture(tmp_path / "other.npz", {"run.layer2": layer(5)})
    numbers = tmp_path / "x.json"
    assert check(scales, other, "--max-rel-l1", "1", "--rename", r"run\.=", "--json", numbers) == 0
    assert "not checked, without data: layer10" in capsys.readouterr().out
    report = json.loads(numbers.read_text())
    assert report["unchecked"] == ["layer10"]
    assert [(row["layer"], row["scales"]) for row in report["layers"]] == [("run.layer2", "layer2")]
    assert check(scales, data, other, data, "--max-rel-l1", "1", "--rename", r"run\.=") == 0
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines()[-7:] if ": " in line][:3] == [
        ["x:", "layer2"], ["x:", "layer10"], ["other:", "run.layer2"],
    ]  # fmt: skip


def test_a_layer_without_scales_is_an_error(case, tmp_path, capsys):
    scales, data, _ = case
    other = save_capture(tmp_path / "other.npz", {"layer2": layer(0), "layer3": layer(0)})
    assert check(scales, data, other) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert "other.npz: layer 'layer3' has no scales" in output.err and "layer2, layer10" in output.err
    assert check(scales, other, "--rename", "layer3=lay") == 2
    assert "layer 'layer3', renamed 'lay', has no scales" in capsys.readouterr().err


def test_what_cannot_be_read_is_an_error_in_one_line(case, tmp_path, capsys):
    scales, data, _ = case
    nan = layer(0)
    nan[1][0, 0, 0] = np.nan
    heads = tuple(np.concatenate([x, x]) for x in layer(0))
    per_head = LayerScales(np.full((3, 1, 1), 0.03))
    other = Scales({"layer2": per_head}).save(tmp_path / "heads.safetensors")
    for arguments, said in [
        ((tmp_path / "no.safetensors", data), "no such file"),
        ((data, data), "expected a file that ends in .safetensors"),
        ((scales, data, tmp_path / "no.npz"), "no such file"),
        ((scales, scales), "found"),
        ((scales, save_capture(tmp_path / "nan.npz", {"layer2": nan})), "nan.npz: layer 'layer2': k: expected finite"),
        ((other, save_capture(tmp_path / "six.npz", {"layer2": heads})), "six.npz: layer 'layer2': quant.q_scale"),
        ((scales, data, "--json", tmp_path / "no" / "x.json"), "no folder"),
    ]:
        assert check(*arguments) == 2
        output = capsys.readouterr()
        assert output.err.startswith("cyflash check: error: ") and said in output.err, (said, output.err)
        assert output.err.count("\n") == 1 and output.out == ""


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "much"])
def test_limits_that_cannot_be(case, capsys, limit):
    with pytest.raises(SystemExit) as stopped:
        check(case[0], case[1], "--max-rel-l1", limit)
    assert stopped.value.code == 2
    assert "--max-rel-l1" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["80", "160"])
def test_the_table_fits_the_terminal(tmp_path, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    name = "model.layers.10.self_attn"
    scales = Scales({name: LayerScales(0.03, 0.03, 0.03)}).save(tmp_path / "s.safetensors")
    check(scales, save_capture(tmp_path / "x.npz", {name: layer(0)}), "--max-worst-row", "0.5")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert any(name in line.split() for line in lines) and any("0.02, row 0.5" in line for line in lines)


@pytest.mark.parametrize("size, found", [("heads", 4), ("kv_heads", 1), ("head_dim", 32), ("v_head_dim", 8)])
def test_scales_of_another_shape_are_refused(tmp_path, capsys, size, found):
    about = {"heads": 3, "kv_heads": 3, "head_dim": 16, "v_head_dim": 16} | {size: found}
    scales = Scales({"a": LayerScales(0.03, 0.03, 0.03)}, about={"a": about}).save(tmp_path / "s.safetensors")
    data = save_capture(tmp_path / "x.npz", {"a": layer(0)})
    assert check(scales, data, "--max-rel-l1", "1") == 2
    assert f"layer 'a': {size}: expected {found}, as of the scales, got" in capsys.readouterr().err
