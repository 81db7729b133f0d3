"""Reading the collective operations of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding

from tests.collectives import Branch, Shape, collectives, traffic

# As XLA writes programs; what is between the lines here is left out.
ASYNCHRONOUS = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,2]{1,0})->f32[4,2]{1,0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(f32[] %x, f32[] %y)
}

%wrapped (p: bf16[8]) -> bf16[4] {
  %p = bf16[8]{0} parameter(0)
  ROOT %scatter = bf16[4]{0} reduce-scatter(bf16[8]{0} %p), dimensions={0}, to_apply=%add
}

ENTRY %main (p0: f32[4,2], p1: bf16[8]) -> f32[4,2] {
  %p0 = f32[4,2]{1,0} parameter(0), metadata={op_name="all-gather(p0) = f32[9]{0}"}
  %gs = (f32[4,2]{1,0}, f32[8,2]{1,0}) all-gather-start(f32[4,2]{1,0} %p0), dimensions={0}
  %gd = f32[8,2]{1,0} all-gather-done((f32[4,2]{1,0}, f32[8,2]{1,0}) %gs)
  %rs = f32[4,2]{1,0} all-reduce-start(%p0), to_apply=%add, metadata={op_name="jit(step)/psum"}
  %rd = f32[4,2]{1,0} all-reduce-done(f32[4,2]{1,0} %rs)
  %ps = (f32[4,2]{1,0}, f32[4,2]{1,0}, u32[], u32[]) collective-permute-start(f32[4,2]{1,0} %p0)
  %as = ((bf16[8]{0}), bf16[4]{0}, u32[]) async-start(bf16[8]{0} %p1), calls=%wrapped
  %ad = bf16[4]{0} async-done(((bf16[8]{0}), bf16[4]{0}, u32[]) %as), calls=%wrapped
  ROOT %t = (pred[3]{0}, /*index=1*/s4[3]{0}) all-reduce(pred[3]{0} %a, s4[3]{0} %b), to_apply=%add
}
"""


def looping(trips):
    return f"""\
%add (x: f32[], y: f32[]) -> f32[] {{
  ROOT %sum = f32[] add(f32[] %x, f32[] %y)
}}
%few (p: f32[2]) -> f32[2] {{
  ROOT %r = f32[2]{{0}} all-reduce(f32[2]{{0}} %p), to_apply=%add
}}
%many (p: f32[2]) -> f32[2] {{
  %g = f32[16]{{0}} all-gather(f32[2]{{0}} %p), dimensions={{0}}
  ROOT %s = f32[2]{{0}} slice(f32[16]{{0}} %g), slice={{[0:2]}}
}}
%body (p: f32[2]) -> f32[2] {{
  ROOT %c = f32[2]{{0}} conditional(%i, %p, %p), branch_computations={{%few, %many}}
}}
%test (p: f32[2]) -> pred[] {{
  ROOT %t = pred[] constant(true)
}}
ENTRY %main (p: f32[2]) -> f32[2] {{
  ROOT %w = f32[2]{{0}} while(f32[2]{{0}} %p), condition=%test, body=%body{trips}
}}
"""


KNOWN = ', backend_config={"known_trip_count":{"n":"3"}}'


def test_asynchronous_operations_count_once_by_their_results():
    found = collectives(ASYNCHRONOUS)
    assert [(each.kind, each.bytes) for each in found] == [
        ("all-gather", 64),
        ("all-reduce", 32),
        ("collective-permute", 32),
        ("reduce-scatter", 8),
        ("all-reduce", 3 + 2),  # a pred is a byte, four bits are half of one
    ]
    assert found[-1].shapes == (Shape("pred", (3,)), Shape("s4", (3,)))
    assert [each.source for each in found if each.source] == ["jit(step)/psum"]
    assert all(each.times == 1 for each in found)


def test_loops_multiply_and_of_conditionals_the_dearest_branch_counts():
    few, many = collectives(looping(KNOWN))
    assert (few.kind, few.times, few.branches) == ("all-reduce", 3, (Branch("c", 0),))
    assert (many.kind, many.times, many.branches) == ("all-gather", 3, (Branch("c", 1),))
    assert traffic(looping(KNOWN)) == {"all-gather": 3 * 64}


def test_loops_without_a_known_number_of_trips():
    assert [each.times for each in collectives(looping(""))] == [None, None]
    with pytest.raises(ValueError, match=r"all-reduce of 8 bytes .* trip count .* by hand"):
        traffic(looping(""))


@pytest.mark.parametrize("text", ["", "HloModule nothing\n"])
def test_texts_without_a_program(text):
    with pytest.raises(ValueError, match="no entry computation; give a compiled program"):
        collectives(text)


def test_what_this_compiler_writes():
    """A loop, a conditional and three kinds of operations, as they are compiled here."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def step(carry, _):
        x, index = carry
        total = lambda x: x + jax.lax.pmean(jnp.sum(x), ("data", "model"))
        x = jax.lax.cond(index % 2 == 0, total, lambda x: 2 * x, x)
        return (x, index + 1), None

    def f(x):
        gathered = jax.lax.all_gather(x, "data", tiled=True)
        (x, _), _ = jax.lax.scan(step, (x, 0), length=5)
        return x, jax.lax.psum_scatter(gathered, "data", tiled=True)

    lies = jax.P("data", "model")
    run = jax.shard_map(f, mesh=mesh, in_specs=lies, out_specs=lies, check_vma=False)
    x = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=NamedSharding(mesh, lies))
    compiled = jax.jit(run).lower(x).compile()
    by_kind = {each.kind: each for each in collectives(compiled)}
    assert by_kind["all-gather"].shapes == (Shape("f32", (8, 3)),)
    assert by_kind["all-reduce"].times == 5
    assert len(by_kind["all-reduce"].branches) == 1
    assert traffic(compiled) == {"all-gather": 96, "all-reduce": 20, "reduce-scatter": 24}
