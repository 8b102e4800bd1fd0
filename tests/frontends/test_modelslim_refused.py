"""msModelSlim configs that are refused, each with its exact message."""

from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec

A8 = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
S8 = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
W8 = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
W4 = W8 | {"dtype": "int4"}


def lq(act: Any = A8, weight: Any = W8, **others: Any) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": weight} if act else {"weight": weight}, **others}


def cfg(*process: Any, **spec: Any) -> dict[str, Any]:
    return {"apiversion": "modelslim_v1", "spec": {"process": list(process), **spec}}


def groups(**ext: Any) -> dict[str, Any]:
    return W4 | {"scope": "per_group", "method": "gptq", "ext": ext}


def refused(config: dict[str, Any]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_spec(config)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("config", "problems"),
    [
        ({"apiversion":"modelslim_v2","spec":{}}, ["apiversion: 'modelslim_v2': is not one of modelslim_v1, multimodal_vlm_modelslim_v1, multimodal_sd_modelslim_v1, modelslim_v0; did you mean modelslim_v1?"]),
        ({"apiversion":"modelslim_v1"}, ['spec: is missing']),
        ({"apiversion":"modelslim_v1","spec":{}}, ['spec.process: is missing']),
        ({"apiversion":"modelslim_convert","spec":{}}, ["apiversion: 'modelslim_convert': checkpoints are not converted tensor by tensor; compile the model with a modelslim_v1 config"]),
        ({"apiversion":1}, [
            'apiversion: 1 is not a string',
            'spec: is missing',
        ]),
        (cfg(), ['spec.process: quantizes nothing: there is no linear_quant that selects a layer']),
        (cfg(lq(),runer="auto"), ['spec.runer: unknown key; did you mean runner?']),
        (cfg(lq(),runner="layerwise"), ["spec.runner: 'layerwise' is not one of auto, layer_wise, dp_layer_wise, model_wise; did you mean layer_wise?"]),
        (cfg(lq(),prior=[{"process":[]},{"process":[{"type":"adapt_rotation"},{"type":"quarot"},3],"dataset":"a"},4]), [
            'spec.prior[0]: stages before are not supported; leave it out',
            'spec.prior[1].process[0]: adapt_rotation: a rotation that is fitted to data is not supported; write quarot',
            "spec.prior[1].process[1]: stages before are not supported; put 'quarot' first in spec.process",
            'spec.prior[1].process[2]: stages before are not supported; put an empty value first in spec.process',
            'spec.prior[2].process: is missing',
            'spec.prior[2]: stages before are not supported; leave it out',
        ]),
        (cfg(lq({**A8,"ext":{"axes":1}}),lq({**A8,"dtype":"mxfp8","scope":"per_block","ext":{"axes":-2}},{**W8,"dtype":"mxfp8","scope":"per_block","ext":{"axes":[0]}})), [
            'spec.process[1].qconfig.act.ext.axes: blocks lie along the inputs; write -1',
            'spec.process[1].qconfig.weight.ext.axes: blocks lie along the inputs; write -1',
        ]),
        (cfg(lq(),dataset=3), ['spec.dataset: 3 is not a string']),
        (cfg(lq(),save=[{"type":"huggingface"}]), ["spec.save[0].type: 'huggingface' is not supported; graphq writes as ascendv1_saver and compressed_tensors"]),
        (cfg(lq(),save=[{"type":"ascendv1_saver"},{"type":"compressed_tensors"}]), ['spec.save: a run writes one target; leave one saver']),
        (cfg(lq(),save=["ascendv1_saver"]), ['spec.save[0].type: is missing']),
        (cfg(lq(),save="ascendv1_saver"), ["spec.save: 'ascendv1_saver' is not a list of savers"]),
        (cfg("linear_quant"), ["spec.process[0]: 'linear_quant' is not a mapping with a type"]),
        (cfg({"type":"linear_qaunt"}), ["spec.process[0].type: 'linear_qaunt' is not a processor; did you mean linear_quant?"]),
        (cfg({"qconfig":{}}), ['spec.process[0].type: is missing']),
        (cfg({"type":"float_sparse"},{"type":"flatquant"},{"type":"svd_res"},{"type":"kv_smooth"},{"type":"adapt_rotation"},{"type":"online_quarot"}), [
            'spec.process[0].type: float_sparse: sparsity is not supported',
            'spec.process[1].type: flatquant: learned transforms are not supported; write quarot, or autoround_quant',
            'spec.process[2].type: svd_res: a low-rank float branch is not supported; write weights of more bits',
            'spec.process[3].type: kv_smooth: factors between keys and queries are not supported; leave it out',
            'spec.process[4].type: adapt_rotation: a rotation that is fitted to data is not supported; write quarot',
            'spec.process[5].type: online_quarot: rotation at run time is written in the native form alone: algorithms: [{rotate: {r4: true}}]',
        ]),
        (cfg(lq(inlcude=["*"])), ['spec.process[0].inlcude: unknown key; did you mean include?']),
        (cfg({"type":"linear_quant"}), ['spec.process[0].qconfig: is missing']),
        (cfg(lq(include=[])), ['spec.process[0].include: is empty: nothing is selected; leave it out for every linear']),
        (cfg(lq(include="*")), ["spec.process[0].include: '*' is not a list; write ['*']"]),
        (cfg(lq(include=[3])), ['spec.process[0].include[0]: 3 is not a pattern']),
        (cfg(lq(include=["a\\b","[^a]*","a b","","{a","{a}","{1..2000}","a"*201,"x.{a,b}.y..z"])), [
            "spec.process[0].include[0]: 'a\\\\b': of brackets, [abc], [a-z] and [!a] are read; \\, [^, [[: and | are not",
            "spec.process[0].include[1]: '[^a]*': of brackets, [abc], [a-z] and [!a] are read; \\, [^, [[: and | are not",
            "spec.process[0].include[2]: 'a b' is not a pattern of layers' names",
            "spec.process[0].include[3]: '' is not a pattern of layers' names",
            "spec.process[0].include[4]: '{a': a brace is not closed",
            "spec.process[0].include[5]: '{a}': {a} is neither a list such as {a,b} nor a range such as {3..60}",
            "spec.process[0].include[6]: '{1..2000}': the braces stand for more than 1,000 patterns",
            "spec.process[0].include[7]: 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'...: the pattern is longer than 128 characters, or has more than 8 braces",
            "spec.process[0].include[8]: 'x.a.y..z' is not a layer name: write dotted segments, such as model.layers.0.mlp.down_proj",
        ]),
        (cfg(lq(include=["{1..40}{1..40}"])), ["spec.process[0].include[0]: '{1..40}{1..40}': the braces stand for more than 1,000 patterns"]),
        (cfg(lq(include=["a"],exclude=["*a"])), ['spec.process[0].exclude: every layer of include is in exclude']),
        (cfg(lq(A8,{**W8,"dtype":"int6"})), ["spec.process[0].qconfig.weight.dtype: 'int6': there are int8, int4, mxfp8, mxfp4, fp8_e4m3; did you mean int8?"]),
        (cfg(lq(A8,{**W8,"dtype":"float"})), ["spec.process[0].qconfig.weight.dtype: 'float': there are int8, int4, mxfp8, mxfp4, fp8_e4m3"]),
        (cfg(lq({**A8,"scope":"pd_mix"})), ['spec.process[0].qconfig.act.symmetric: pd_mix is asymmetric in msModelSlim; write false']),
        (cfg(lq({**A8,"scope":"per_channel"})), ["spec.process[0].qconfig.act.scope: 'per_channel': act int8 has per_tensor, per_token, pd_mix"]),
        (cfg(lq(A8,{**W8,"scope":"per_tensor"})), ["spec.process[0].qconfig.weight.scope: 'per_tensor': weight int8 has per_channel, per_group"]),
        (cfg(lq({**A8,"symmetric":False})), ['spec.process[0].qconfig.act.symmetric: int8 per_token of act is symmetric in msModelSlim; write true']),
        (cfg(lq({**A8,"method":"histogram"})), ['spec.process[0].qconfig.act.method: histogram is for scope per_tensor, whose range is not found at run time; int8 per_token takes minmax']),
        (cfg(lq(A8,{**W8,"method":"awq"})), ["spec.process[0].qconfig.weight.method: 'awq': there are minmax, ssz, gptq, autoround"]),
        (cfg(lq(A8,{**W8,"method":"autoround"})), ['spec.process[0].qconfig.weight.method: autoround is part of the processor autoround_quant alone']),
        (cfg(lq({**A8,"dtype":"mxfp4","scope":"dual_scale","method":"dualscale"},{**W8,"dtype":"mxfp4","scope":"per_block","method":"ceil_x"})), [
            'spec.process[0].qconfig.act.scope: dual_scale: mxfp4 blocks under a second scale are not supported; write per_block',
            'spec.process[0].qconfig.act.method: dualscale: mxfp4 blocks under a second scale are not supported; write minmax with scope per_block',
            'spec.process[0].qconfig.weight.method: ceil_x: its exponent rule is not supported; write minmax',
        ]),
        (cfg(lq(A8,{**groups(group_size=32),"method":"ssz"})), ['spec.process[0].qconfig.weight.method: ssz is for symmetric integers with scope per_channel, not for int4 per_group']),
        (cfg(lq(A8,{**W8,"dtype":"fp8_e4m3","method":"gptq"})), ['spec.process[0].qconfig.weight.method: gptq is for int8 and int4, not for fp8_e4m3']),
        (cfg(lq(S8,W4)), ['spec.process[0].qconfig: msModelSlim has no int4 per_channel weights with int8 per_tensor asym activations; with these it has int8 per_channel']),
        (cfg(lq({**A8,"dtype":"int4"},W8)), ['spec.process[0].qconfig: msModelSlim has no int8 per_channel weights with int4 per_token activations; with these it has int4 per_channel, int4 per_group']),
        (cfg(lq(A8,{**W4,"symmetric":False,"method":"gptq"})), ['spec.process[0].qconfig: msModelSlim has no int4 per_channel asym weights with int8 per_token activations; with these it has int8 per_channel, int8 per_group, int4 per_channel, int4 per_group']),
        (cfg(lq({**A8,"dtype":"fp8_e4m3"},W8)), ['spec.process[0].qconfig: msModelSlim has no int8 per_channel weights with fp8_e4m3 per_token activations; with these it has fp8_e4m3 per_channel']),
        (cfg(lq(A8,{**W8,"ext":{"step":3}})), ['spec.process[0].qconfig.weight.ext.step: unknown key']),
        (cfg(lq(A8,{**W8,"method":"ssz","ext":{"step":0}})), ['spec.process[0].qconfig.weight.ext.step: ssz steps: 0 is not a positive integer']),
        (cfg(lq(A8,{**W8,"method":"ssz","ext":{"steps":3}})), ['spec.process[0].qconfig.weight.ext.steps: unknown key; did you mean step?']),
        (cfg(lq({**A8,"ext":{"aggregation_type":"mean"}})), ['spec.process[0].qconfig.act.ext.aggregation_type: only max, the extremes of all batches, is supported']),
        (cfg(lq(A8,{**W8,"method":"gptq","ext":{"percdamp":"x","block_size":0}})), [
            "spec.process[0].qconfig.weight.ext.percdamp: 'x' is not a number",
            'spec.process[0].qconfig.weight.ext.block_size: 0 is not a whole number from 1',
        ]),
        (cfg(lq(A8,{**W8,"method":"gptq","ext":{"percdamp":2}})), ['spec.process[0].qconfig.weight.ext.percdamp: 2 is not a number above 0, up to 1']),
        (cfg(lq(A8,groups(group_size=-1))), ['spec.process[0].qconfig.weight.ext.group_size: -1 is not a positive integer']),
        (cfg(lq(A8,{**groups(),"method":"minmax"})), ['spec.process[0].qconfig.weight.ext.group_size: is missing']),
        (cfg(lq({"dtype":"float","scope":"per_tensor","symmetric":True,"method":"minmax"})), ["spec.process[0].qconfig.act.method: 'minmax' finds ranges, and float has none; write none"]),
        (cfg(lq(A8,{"dtype":"int8"})), [
            'spec.process[0].qconfig.weight.scope: is missing',
            'spec.process[0].qconfig.weight.method: is missing',
            'spec.process[0].qconfig.weight.symmetric: is missing',
        ]),
        (cfg({"type":"linear_quant","qconfig":{"act":A8}}), ['spec.process[0].qconfig.weight: is missing']),
        (cfg({"type":"group","configs":[{"type":"awq"},3]}), [
            'spec.process[0].configs[0]: a group holds processors of type linear_quant, and no others',
            'spec.process[0].configs[1]: a group holds processors of type linear_quant, and no others',
        ]),
        (cfg({"type":"group"}), ['spec.process[0].configs: is missing']),
        (cfg({"type":"autoround_quant","iters":0,"enable_round_tuning":False,"strategies":[{"qconfig":{"act":A8,"weight":W8}},3]}), [
            'spec.process[0].iters: 0 is not a whole number from 1',
            'spec.process[0].enable_round_tuning: graphq learns roundings and ranges together; write true',
            'spec.process[0].strategies[0].qconfig.weight.method: minmax is not part of autoround_quant; write autoround, or a linear_quant',
            'spec.process[0].strategies[1]: 3 is not a mapping with qconfig',
        ]),
        (cfg(lq(),{"type":"iter_smooth"}), ['spec.process[1].type: iter_smooth comes after process[0], which has quantized layers; put it in front']),
        (cfg({"type":"iter_smooth"},{"type":"quarot"},lq()), ['spec.process[1].type: graphq rotates before it scales; put quarot first']),
        (cfg({"type":"quarot","online":True,"block_size":48,"down_proj_online_layers":[1]},lq()), [
            'spec.process[0].online: rotation at run time is written in the native form alone: algorithms: [{rotate: {r4: true}}]',
            'spec.process[0].block_size: 48 is neither -1 nor a power of two',
        ]),
        (cfg({"type":"iter_smooth","alpha":1.5,"scale_min":0.1,"symmetric":False,"enable_subgraph_type":["norm_linear"],"include":["{self_attn*"],"exclude":"a"},lq()), [
            'spec.process[0].scale_min: factors are at least 1e-05 here; write that, or leave it out',
            'spec.process[0].alpha: 1.5 is not a number from 0 to 1',
            'spec.process[0].symmetric: a shift of channels is not supported; write true',
            "spec.process[0].enable_subgraph_type[0]: 'norm_linear' is not a kind of subgraph; did you mean norm-linear?",
            "spec.process[0].include[0]: '{self_attn*': a brace is not closed",
            "spec.process[0].exclude: 'a' is not a list; write ['a']",
        ]),
        (cfg({"type":"flex_smooth_quant","alpha":0.5},lq()), ['spec.process[0].alpha: beta is 1 - alpha in graphq; write such a pair, or neither to have them searched']),
        (cfg({"type":"flex_smooth_quant","alpha":0.5,"beta":0.6},lq()), ['spec.process[0].alpha: beta is 1 - alpha in graphq; write such a pair, or neither to have them searched']),
        (cfg({"type":"flex_awq_ssz","alpha":0.5},lq()), [
            'spec.process[0].alpha: graphq searches it; leave it out',
            'spec.process[0].qconfig: is missing',
        ]),
        (cfg({"type":"awq","n_grid":0,"clip":True},lq()), [
            'spec.process[0].clip: unknown key',
            'spec.process[0].n_grid: 0 is not a whole number from 1',
        ]),
        (cfg(lq(),{"type":"dynamic_cache"}), ["spec.process[1].include: graphq has one format for the whole cache; write include: ['*'], without which msModelSlim quantizes none of it, and no exclude"]),
        (cfg(lq(),{"type":"dynamic_cache","include":["*"],"qconfig":{"scope":"per_token","dtype":"int4","method":"ssz","ext":{"a":1}}},{"type":"dynamic_cache","include":["*"]}), [
            "spec.process[1].qconfig.scope: 'per_token': the cache has per_channel",
            "spec.process[1].qconfig.dtype: 'int4': the cache has int8",
            "spec.process[1].qconfig.method: 'ssz': the cache has minmax",
            'spec.process[1].qconfig.ext: minmax of a cache has no options',
            'spec.process[2].type: a second dynamic_cache; graphq has one format for the whole cache',
        ]),
        (cfg(lq(),{"type":"fa3_quant","include":["*self_attn*"],"qconfig":{"dtype":"mxfp4","scope":"per_channel","symmetric":False,"method":"ssz"}},{"type":"fa3_quant"},{"type":"fa3_quant"}), [
            'spec.process[1].include: graphq has one format for every attention; leave out include and exclude',
            "spec.process[1].qconfig.dtype: 'mxfp4' is not int8 or fp8_e4m3",
            "spec.process[1].qconfig.scope: 'per_channel' is not per_head or per_token",
            "spec.process[1].qconfig.symmetric: attention's operands are symmetric; write true",
            "spec.process[1].qconfig.method: attention's operands have minmax, without options",
            'spec.process[3].type: a second fa3_quant; graphq has one format for every attention',
        ]),
        (cfg(lq(include=["*self_attn*"],exclude=["*kv_b_proj"]),lq(None, groups(), include=["*mlp*"])), ['spec.process[1].include: patterns cannot say which layers of *mlp* are left by process[0], which rounds by another method; put this processor in front of process[0]']),
    ],
)  # fmt: skip
def test_what_is_refused(config, problems):
    assert refused(config) == problems


def test_too_many_patterns():
    many = [f"*{i}" for i in range(900)]
    process = "spec.process: more than"
    assert refused(cfg(lq(include=["*{1..1000}"]), lq(include=["{1..1000}*"]), lq(include=["*x"]))) == [
        f"{process} 2,000 patterns in all, braces written out"
    ]
    assert refused(cfg(lq(include=many[:60], exclude=many[100:151]))) == [
        f"{process} 3,000 pairs of patterns in include and exclude; write fewer"
    ]
    assert refused(cfg(lq(include=["*{1..600}", "{1..600}*"]))) == [
        "spec.process[0].include: more than 1,000 patterns, braces written out"
    ]
    gptq = W8 | {"method": "gptq"}
    assert refused(cfg(lq(include=many[:50]), lq(A8, gptq, include=[f"x{i}*" for i in range(41)]))) == [
        "spec.process[1]: too many patterns to tell apart what the processors before it round otherwise"
    ]
    load_spec(cfg(lq(include=many[:60], exclude=many[100:150])))  # 3,000 pairs
    load_spec(cfg(lq(exclude=[f"a.b{i}" for i in range(900)])))
