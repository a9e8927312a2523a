"""What the places that patches change are to the rest of a release: by syntax trees, per release.

Aliases, late assignments, identity, registration, parameters, and what our own code imports.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import derived_ascend
import drift_sources
import our_code
import pytest
from import_time import Found, uses
from release_tree import FUNCTIONS, Tree, calls, every_argument

from ascend_patch import _registry
from ascend_patch._registry import Host, Symbol, Target

each_cell = pytest.mark.parametrize(("host", "release"), drift_sources.cells())

# What else than a name holds a function from import on, and why ours is reached all the same.
KEPT = {
    # 0.11.0 puts it into a module of vLLM, whose names are rebound by identity.
    (
        "vllm_ascend.ops.fla:torch_chunk_gated_delta_rule",
        "vllm_ascend.patch.worker.patch_triton",
        "vllm.model_executor.layers.fla.ops.chunk.chunk_gated_delta_rule = "
        "torch_chunk_gated_delta_rule",
    ),
    # 0.18.0 keeps vLLM's own method and calls it from the one that takes its place.
    (
        "vllm.v1.attention.backends.gdn_attn:GDNAttentionMetadataBuilder.build",
        "vllm_ascend.patch.worker.patch_gdn_attn",
        "_ORIGINAL_BUILD = gdn_attn.GDNAttentionMetadataBuilder.build",
    ),
}


def trees_of(host: Host, release: str) -> dict[str, Tree]:
    roots = drift_sources.roots_of(host, release)
    return {name: Tree(root, name) for name, root in roots.items()}


@cache
def targets_of(host: Host, release: str) -> tuple[Target, ...]:
    """Every target that some device has on a release."""
    found: dict[Target, None] = {}
    for patch in _registry.load():
        for device in drift_sources.DEVICES[host]:
            band = drift_sources.decide(patch, host, release, device).band
            if band is not None:
                found.update(dict.fromkeys(band.targets))
    return tuple(found)


@cache
def uses_of(host: Host, release: str) -> tuple[Found, ...]:
    targets = targets_of(host, release)
    places = {str(target.place) for target in targets} | {target.symbol for target in targets}
    return tuple(uses(trees_of(host, release), frozenset(places)))


@each_cell
def test_the_module_that_assigns_a_place_last_is_the_one_that_is_waited_for(
    host: Host, release: str
) -> None:
    """A target attaches when that module is executed; any other assignment would undo ours."""
    for target in targets_of(host, release):
        assigned = {
            (one.module, one.inside)
            for one in uses_of(host, release)
            if one.kind == "assigned" and one.place == str(target.place)
        }
        late = bool(target.assigned_to) or (target.assigned_by and not target.operator)
        assert assigned == ({(target.module, "")} if late else set()), target.id


@each_cell
def test_nothing_but_names_holds_a_function_from_import_on(host: Host, release: str) -> None:
    """Names of modules are rebound by identity; a table, a default or a decorator would not be."""
    targets = {target.symbol: target for target in targets_of(host, release)}
    strange = []
    for one in uses_of(host, release):
        target = targets.get(one.place)
        operator = target is not None and target.operator and one.module == target.module
        handed_on = target is not None and target.assigned_to and one.module == target.module
        known = (one.place, one.module, one.text) in KEPT
        if one.kind == "kept" and not (operator or handed_on or known):
            strange.append(one)
    assert strange == []


@each_cell
def test_identity_is_kept(host: Host, release: str) -> None:
    """Classes stay the ones that isinstance and `type() is` know; no function is compared."""
    trees = trees_of(host, release)
    assert [one for one in uses_of(host, release) if one.kind == "compared"] == []
    for target in targets_of(host, release):
        place = target.place
        node = trees[place.package].node(str(place))
        if node is None:
            # Inherited: the class itself is there.
            owner = str(place).rpartition(".")[0]
            assert isinstance(trees[place.package].node(owner), ast.ClassDef), target.id
            continue
        assert isinstance(node, FUNCTIONS), f"{target.id} is a class"


@each_cell
def test_operators_are_registered_where_they_are_waited_for(host: Host, release: str) -> None:
    wanted = [target for target in targets_of(host, release) if target.operator]
    if not wanted:
        return
    tree = trees_of(host, release)[host]
    found = derived_ascend.registered(tree)
    for target in wanted:
        namespace, _, name = target.operator.partition("::")
        assert namespace == "vllm"
        module, function, key = found[name]
        assert (module, function, key) == (target.module, target.symbol, target.dispatch_key)
        # When the module has been executed it is there: no function has to be called first.
        at_import = [
            call
            for statement in tree.module(module).body  # type: ignore[union-attr]
            if not isinstance(statement, (*FUNCTIONS, ast.ClassDef))
            for call in calls(statement, "direct_register_custom_op")
        ]
        assert any(f"op_name='{name}'" in ast.unparse(call) for call in at_import)


@each_cell
def test_ours_take_what_the_originals_take(host: Host, release: str) -> None:
    """Traced functions and operators are called with positions and keywords of the original's."""
    trees = trees_of(host, release)
    for target in targets_of(host, release):
        original = trees[Symbol.parse(target.symbol).package].node(target.symbol)
        assert isinstance(original, FUNCTIONS), target.id
        if target.seam == "host":
            continue  # a wrapt wrapper, which is given (args, kwargs)
        names = [argument.arg for argument in every_argument(original.args)]
        made = our_code.made_by(target.replacement)
        assert made, f"{target.replacement} returns nothing that could be read"
        for ours in made:
            assert [one.arg for one in every_argument(ours.args)] == names, target.replacement
            assert len(ours.args.defaults) >= len(original.args.defaults), target.replacement


@each_cell
def test_what_ours_import_of_the_host_is_there(host: Host, release: str) -> None:
    trees = trees_of(host, release)
    missing = [
        f"{target.replacement} imports {name} from {module}"
        for target in targets_of(host, release)
        for module, name in our_code.host_imports(target.replacement, tuple(trees))
        if not our_code.provides(trees[module.partition(".")[0]], module, name)
    ]
    assert missing == []


# --- the controls: made releases, in which each of these is wrong -------------------------------

ROPE = "def turn(x, y=1): ...\n\n\nclass Rope:\n    def forward(self): ...\n"
TURN, FORWARD = "made.rope:turn", "made.rope:Rope.forward"


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ("from made.rope import turn", ["imported"]),
        ("from made import turn as other", ["imported"]),
        ("def late():\n    from .rope import turn", ["imported"]),
        ("class A:\n    from made.rope import turn", ["kept"]),
        ("from made.rope import turn\nTABLE = {'a': turn}", ["imported", "kept"]),
        ("from made.rope import turn\ndef f(g=turn): ...", ["imported", "kept"]),
        ("from made.rope import turn\n@turn\ndef f(): ...", ["imported", "kept"]),
        ("from made import rope\ndef f(): rope.turn()", []),
        ("import made.rope\nmade.rope.turn = 1", ["assigned"]),
        ("from made import rope as r\nr.Rope.forward = 1", ["assigned"]),
        ("from .rope import Rope\ndef f(): setattr(Rope, 'forward', 1)", ["assigned"]),
        ("from .rope import Rope\nclass B(Rope):\n    apply = Rope.forward", ["kept"]),
        ("from .rope import Rope\nassert Rope.forward is not None", ["compared", "kept"]),
        ("from other import Rope, turn\nRope.forward = turn", []),
        ("def turn(): ...\nturn.forward = turn\nclass Rope: ...\nRope.forward = 1", []),
    ],
)
def test_each_kind_of_use_is_found(tmp_path: Path, source: str, kinds: list[str]) -> None:
    for name, text in (
        ("__init__", "from .rope import turn\n"),
        ("rope", ROPE),
        ("use", source),
    ):
        file = tmp_path / "made" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    found = uses({"made": Tree(tmp_path, "made")}, frozenset({TURN, FORWARD}))
    assert [one.kind for one in found if one.module == "made.use"] == sorted(kinds), found


def test_a_method_that_its_own_class_keeps_under_another_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/rope.py").write_text(ROPE + "    forward_hip = forward\n")
    (found,) = uses({"made": Tree(tmp_path, "made")}, frozenset({FORWARD}))
    assert (found.kind, found.text) == ("kept", "forward_hip = forward")


def test_what_a_release_does_not_have_is_missed(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/rope.py").write_text(ROPE + "LIMIT = 1\n")
    tree = Tree(tmp_path, "made")
    assert our_code.provides(tree, "made.rope", "Rope")
    assert our_code.provides(tree, "made.rope", "LIMIT")
    assert not our_code.provides(tree, "made.rope", "Other")
    assert not our_code.provides(tree, "made.gone", "Rope")
    imported = set(our_code.host_imports("ascend_patch.impl.rotary_fused:forward", ("vllm",)))
    assert ("vllm.model_executor.layers.layernorm", "RMSNorm") in imported
    assert len(imported) == 5
