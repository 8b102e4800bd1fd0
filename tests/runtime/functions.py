"""Functions of tensors that modules plausibly compute, as expressions of a few inputs: ``tests.runtime.test_allowed_ops``.

``x``: float ``[2, 8]``; ``v``: ``[2, 4, 8]``; ``im``: ``[2, 4, 8, 8]``; ``vol``: ``[2, 4, 6, 6, 6]``; ``ids``: integers ``[2, 4]`` from 0 to 7; ``b``: bools
like ``x``; ``W``: a constant ``[16, 8]``.
"""

from typing import Final

EXPRESSIONS: Final[dict[str, str]] = {
    "activations": """
        F.relu(x); F.relu6(x); F.gelu(x); F.gelu(x, approximate='tanh'); F.silu(x); F.mish(x); F.elu(x); F.celu(x);
        F.selu(x); F.leaky_relu(x); F.hardtanh(x); F.hardswish(x); F.hardsigmoid(x); F.softplus(x); F.softsign(x);
        F.logsigmoid(x); F.tanhshrink(x); F.softshrink(x); F.hardshrink(x); F.threshold(x, 0.0, 0.0); F.glu(x);
        T.sigmoid(x); T.tanh(x); F.softmax(x, -1); F.log_softmax(x, -1); F.softmin(x, -1); F.prelu(x, T.tensor(0.2))
    """,
    "unary": """
        T.exp(x); T.expm1(x); T.exp2(x); T.log(x); T.log2(x); T.log10(x); T.log1p(x); T.sqrt(x); T.rsqrt(x); T.abs(x);
        T.neg(x); T.sign(x); T.sgn(x); T.floor(x); T.ceil(x); T.round(x); T.round(x, decimals=2); T.trunc(x);
        T.frac(x); T.sin(x); T.cos(x); T.tan(x); T.asin(x); T.acos(x); T.atan(x); T.sinh(x); T.cosh(x); T.asinh(x);
        T.acosh(x); T.atanh(x); T.erf(x); T.erfc(x); T.erfinv(x); T.reciprocal(x); T.square(x); T.sinc(x); T.isnan(x);
        T.isinf(x); T.isfinite(x); T.nan_to_num(x); T.logit(x.sigmoid()); T.positive(x); T.special.expit(x)
    """,
    "binary": """
        x + x; x + 1; 1 - x; x - x; x * x; x * 2; x / x; x / 2; 2 / x; x // 2; x // x; x % 2; x % x; x ** 2; x ** x;
        2 ** x; T.div(x, x, rounding_mode='floor'); T.div(x, 2, rounding_mode='trunc'); T.fmod(x, 2.0); T.fmod(x, x);
        T.remainder(x, 2); T.maximum(x, x); T.minimum(x, x); T.fmax(x, x); T.fmin(x, x); T.atan2(x, x);
        T.copysign(x, x); T.lerp(x, x, 0.5); T.lerp(x, x, x); T.addcmul(x, x, x); T.addcdiv(x, x, x);
        T.logaddexp(x, x); T.logaddexp2(x, x); T.xlogy(x, x); T.rsub(x, x); T.rsub(x, 2); T.floor_divide(x, x);
        T.true_divide(x, 2); T.float_power(x, 2); T.pow(x, x); T.sub(x, x, alpha=2); T.add(x, x, alpha=2)
    """,
    "comparisons": """
        x > 0; x >= x; x < 0; x <= x; x == x; x == 0; x != x; x != 1; x > x; x < x; x >= 0; x <= 0; b & b; b | b;
        b ^ b; ~b; ~ids; ids & 3; ids | 1; ids ^ 1; ids << 1; ids >> 1; ids << ids; T.logical_and(b, b);
        T.logical_or(b, b); T.logical_xor(b, b); T.logical_not(b); T.isclose(x, x); T.where(b, x, x);
        T.where(b, x, 0.0); T.where(b, 0.0, x); T.where(b, 1.0, 0.0); T.clamp(x, 0, 1); T.clamp(x, min=0);
        T.clamp(x, x, x); T.clamp_min(x, 0.0); T.clamp_max(x, 1.0); T.clip(x, 0, 1); x.bool(); x.masked_fill(b, 0.0);
        x.masked_fill(b, T.tensor(0.0)); T.bitwise_and(ids, ids); T.bitwise_or(ids, ids); T.bitwise_xor(ids, ids);
        T.bitwise_left_shift(ids, 1); T.bitwise_right_shift(ids, 1); T.isin(ids, ids); T.eq(x, x)
    """,
    "reductions": """
        x.sum(); x.sum(-1); x.mean(); x.mean(-1); x.prod(-1); x.prod(); x.amax(-1); x.amin(-1); x.max(); x.min();
        x.max(-1)[0]; x.min(-1)[1]; x.argmax(-1); x.argmax(); x.argmin(-1); x.std(-1); x.std(); x.var(-1); x.var();
        x.var(-1, unbiased=False); T.var_mean(x, -1)[0]; T.std_mean(x, -1)[0]; x.any(); x.any(-1); x.all(); x.all(-1);
        x.norm(); x.norm(dim=-1); x.norm(p=1, dim=-1); T.linalg.norm(x); T.linalg.vector_norm(x, dim=-1);
        T.logsumexp(x, -1); x.cumsum(-1); x.cumprod(-1); T.cummax(x, -1)[0]; T.cummin(x, -1)[0];
        T.logcumsumexp(x, -1); T.count_nonzero(x); x.median(); x.median(-1)[0]; T.nanmean(x); T.nansum(x);
        T.kthvalue(x, 2)[0]; T.quantile(x, 0.5); T.aminmax(x)[0]; T.diff(x); T.histc(x); T.any(b, -1, True)
    """,
    "shapes": """
        x.reshape(-1); x.flatten(); v.flatten(1); v.flatten(0, 1); v.transpose(1, 2); v.permute(0, 2, 1); x.t(); x.T;
        v.mT; v.mH; x.unsqueeze(0); x.unsqueeze(0).squeeze(0); x.unsqueeze(0).squeeze(); x.unsqueeze(0).squeeze((0,));
        x.expand_as(x); x.repeat(2, 1); x.tile(2); x.repeat_interleave(2, 0); T.cat([x, x]); T.stack([x, x]);
        T.hstack([x, x]); T.vstack([x, x]); x.chunk(2, -1)[0]; x.split(4, -1)[0]; x.split([3, 5], -1)[0];
        T.tensor_split(x, 2, -1)[0]; T.tensor_split(x, (3,), -1)[0]; x[0]; x[:, 1:3]; x[..., ::2]; x[None]; x[:, -1];
        x.narrow(1, 0, 2); x.select(0, 1); x.roll(1, 0); x.roll((1, 1), (0, 1)); x.flip(0); T.fliplr(x); T.flipud(x);
        T.rot90(x); x.unflatten(1, (2, 4)); v.movedim(1, 2); v.movedim((0, 1), (1, 0)); v.swapaxes(1, 2);
        v.swapdims(1, 2); x.diagonal(); T.diag_embed(x); T.diag(x); x.tril(); x.triu(); T.tril_indices(3, 3);
        T.triu_indices(3, 3); x.contiguous(); x.clone(); x.detach(); x.to(T.float64); x.half(); x.bfloat16();
        x.float(); x.long(); x.int(); x.double(); x.type_as(x); x.view_as(x); x.reshape_as(x); x.unfold(1, 2, 1);
        T.meshgrid(x[0], x[1], indexing='ij')[0]; T.meshgrid(x[0], x[1], indexing='xy')[0]; T.ravel(x); T.squeeze(x);
        T.view_as_real(T.complex(x, x)); T.polar(x.abs(), x).real; T.complex(x, x).imag;
        T.view_as_real(T.complex(x, x) * T.complex(x, x)); T.complex(x, x).conj().real; T.angle(x); x.type(T.float64);
        T.adjoint(v); x.view(T.int32); T.column_stack([x, x])
    """,
    "indexing": """
        x[:, ids]; x.index_select(0, T.tensor([0, 1])); x.gather(1, ids); x.take(ids); x.scatter(1, ids, 0.0);
        x.scatter(1, ids, x[:, :4]); x.scatter_add(1, ids, x[:, :4]); x.scatter(1, ids, x[:, :4], reduce='add');
        x.scatter_reduce(1, ids, x[:, :4], reduce='amax'); x.index_fill(0, T.tensor([0, 1]), 0.0);
        x.index_put((T.tensor([0, 1]),), x); x.masked_scatter(b, x); x.slice_scatter(x[:, :2], 1, 0, 2);
        x.select_scatter(x[0], 0, 0); x.diagonal_scatter(x.diagonal()); x.sort(-1)[0];
        T.sort(x, dim=-1, stable=True)[0]; x.argsort(-1); x.topk(2)[0]; T.searchsorted(x, x); T.bucketize(x, x[0]);
        F.embedding(ids, W); F.one_hot(ids, 8); F.embedding(ids, W, padding_idx=0)
    """,
    "products": """
        F.linear(x, W); F.linear(x, W, W[:, 0]); x @ W.T; T.matmul(v, W.T); T.bmm(v, v.mT); T.mm(x, x.T);
        T.mv(x, x[0]); T.dot(x[0], x[0]); T.outer(x[0], x[0]); T.addmm(W[:, 0], x, W.T); T.baddbmm(v @ v.mT, v, v.mT);
        T.addmv(x[:, 0], x, x[0]); T.einsum('bi,oi->bo', x, W); T.tensordot(x, W, ([1], [1])); T.inner(x, x);
        F.cosine_similarity(x, x); F.pairwise_distance(x, x); F.normalize(x); T.linalg.cross(x[:, :3], x[:, :3]);
        T.linalg.matrix_norm(x)
    """,
    "attention": """
        F.scaled_dot_product_attention(v, v, v); F.scaled_dot_product_attention(v, v, v, is_causal=True);
        F.scaled_dot_product_attention(im, im, im, attn_mask=T.ones(8, 8, dtype=T.bool));
        F.scaled_dot_product_attention(im, im, im, scale=0.5);
        F.scaled_dot_product_attention(im[:, :, :3], im[:, :, :5], im[:, :, :5], T.zeros(3, 5));
        F.scaled_dot_product_attention(im, im[:, :2, :6], im[:, :2, :6], enable_gqa=True);
        F.scaled_dot_product_attention(im[:1], im, im[:, :1, :, :3])
    """,
    "norms": """
        F.layer_norm(x, (8,)); F.layer_norm(x, (8,), x[0], x[0]); F.rms_norm(x, (8,)); F.rms_norm(x, (8,), x[0]);
        F.group_norm(im, 2); F.instance_norm(im); F.batch_norm(im, T.zeros(4), T.ones(4));
        F.batch_norm(x, T.zeros(8), T.ones(8)); F.local_response_norm(im, 2)
    """,
    "convolutions": """
        F.unfold(im, 3); F.pixel_shuffle(im, 2); F.pixel_unshuffle(im, 2); F.channel_shuffle(im, 2);
        F.conv1d(v, T.ones(3, 4, 3)); F.conv1d(v, T.ones(3, 4, 3), padding='same'); F.conv2d(im, T.ones(3, 4, 3, 3));
        F.conv2d(im, T.ones(3, 4, 3, 3), padding='same'); F.conv3d(vol, T.ones(3, 4, 3, 3, 3));
        F.conv3d(vol, T.ones(3, 4, 3, 3, 3), padding='same'); F.conv_transpose1d(v, T.ones(4, 3, 3));
        F.conv_transpose2d(im, T.ones(4, 3, 3, 3)); F.conv_transpose3d(vol, T.ones(4, 3, 3, 3, 3));
        F.fold(F.unfold(im, 2), 8, 2)
    """,
    "pools": """
        F.max_pool1d(v, 2); F.max_pool2d(im, 2); F.max_pool2d(im, 2, return_indices=True)[0]; F.max_pool3d(vol, 2);
        F.avg_pool1d(v, 2); F.avg_pool2d(im, 2); F.avg_pool3d(vol, 2); F.adaptive_avg_pool1d(v, 2);
        F.adaptive_avg_pool2d(im, 2); F.adaptive_avg_pool2d(im, 1); F.adaptive_avg_pool3d(vol, 2);
        F.adaptive_max_pool1d(v, 2); F.adaptive_max_pool2d(im, 2); F.adaptive_max_pool3d(vol, 2);
        F.lp_pool2d(im, 2, 2); F.lp_pool1d(v, 2, 2); F.max_unpool2d(*F.max_pool2d(im, 2, return_indices=True), 2)
    """,
    "resizing": """
        F.interpolate(im, scale_factor=2); F.interpolate(im, size=(5, 5));
        F.interpolate(im, size=(5, 5), mode='bilinear');
        F.interpolate(im, scale_factor=2, mode='bilinear', align_corners=True);
        F.interpolate(im, scale_factor=2, mode='bicubic');
        F.interpolate(im, size=(5, 5), mode='bilinear', antialias=True);
        F.interpolate(im, size=(5, 5), mode='bicubic', antialias=True);
        F.interpolate(v, scale_factor=2, mode='linear'); F.interpolate(v, scale_factor=2);
        F.interpolate(vol, scale_factor=2); F.interpolate(vol, scale_factor=2, mode='trilinear');
        F.interpolate(im, size=5, mode='area'); F.interpolate(im, size=5, mode='nearest-exact');
        F.interpolate(v, size=5, mode='nearest-exact'); F.pad(x, (1, 1)); F.pad(im, (1, 1, 1, 1), mode='reflect');
        F.pad(im, (1, 1, 1, 1), mode='replicate'); F.pad(im, (1, 1, 1, 1), mode='circular');
        F.pad(x, (1, 1), value=2.0); T.constant_pad_nd(x, (1, 1)); nn.ReflectionPad2d(1)(im); nn.ZeroPad2d(1)(im);
        nn.ReplicationPad1d(1)(v); nn.ConstantPad3d(1, 0.0)(vol); F.grid_sample(im, im[:, :2, :3, :2] * 0.5);
        F.grid_sample(im, im[:, :2, :3, :2], 'nearest', 'reflection', True)
    """,
    "factories": """
        T.zeros(2); T.ones(2); T.full((2,), 3.0); T.arange(4); T.arange(1, 4); T.arange(0, 4, 2); T.linspace(0, 1, 4);
        T.eye(3); T.eye(3, 4); T.zeros_like(x); T.ones_like(x); T.full_like(x, 2.0); x.new_zeros(2); x.new_ones(2);
        x.new_full((2,), 1.0); T.tensor([1.0, 2.0]); T.scalar_tensor(2.0); T.as_tensor(3.0); T.hann_window(8);
        T.full((2,), True)
    """,
    "in place": """
        x.clone().add_(1); x.clone().mul_(x); x.clone().relu_(); x.clone().masked_fill_(b, 0.0); x.clone().copy_(x);
        x.clone().zero_(); x.clone().fill_(1.0); x.clone().clamp_(0, 1); x.clone().scatter_(1, ids, 0.0);
        x.clone().index_put_((T.tensor([0]),), x[:1]); x.clone().sub_(x).div_(2).neg_().exp_();
        F.relu(x.clone(), inplace=True); F.silu(x.clone(), inplace=True); F.hardswish(x.clone(), inplace=True);
        x.clone().transpose_(0, 1); x.clone().unsqueeze_(0)
    """,
    "fourier": """
        T.fft.fft(x).real; T.fft.rfft(x).abs(); T.fft.irfft(T.fft.rfft(x)); T.fft.fft2(v).real;
        T.fft.ifft(T.fft.fft(x)).real; T.fft.rfft2(v).real; T.fft.irfft2(T.fft.rfft2(v)); T.fft.fftn(v).real;
        T.fft.fftshift(x)
    """,
    "dropout": """
        F.dropout(x, training=False); F.dropout2d(im, training=False); F.alpha_dropout(x, training=False)
    """,
    "cells": """
        T.lstm_cell(x, (x[:, :4], x[:, 4:]), W, W[:, :4], W[:, 0], W[:, 1])[1];
        T.gru_cell(x, x[:, :4], W[:12], W[:12, :4], W[:12, 0], W[:12, 1]); T.gru_cell(x, x[:, :4], W[:12], W[:12, :4]);
        T.rnn_tanh_cell(x, x[:, :4], W[:4], W[:4, :4], W[:4, 0], W[:4, 1]);
        T.rnn_relu_cell(x, x[:, :4], W[:4], W[:4, :4], W[:4, 0], W[:4, 1])
    """,
    "signals": """
        T.stft(x, 4, 2, window=T.hann_window(4), return_complex=True).abs(); T.hann_window(4, False);
        T.stft(v.flatten(1), 8, center=False, return_complex=True).abs(); T.hamming_window(4);
        T.hamming_window(4, False); T.hamming_window(4, True, 0.5); T.hamming_window(4, True, 0.5, 0.4);
        T.istft(T.stft(v.flatten(1), 8, window=T.hann_window(8), return_complex=True), 8, window=T.hann_window(8))
    """,
    "weight norm": """
        T._weight_norm(W, W[:, :1]); T._weight_norm(W, W[:1], 1); T._weight_norm(W, W.norm(), -1);
        T._weight_norm(W.reshape(2, 4, 16), W[:4, :1].reshape(1, 4, 1), 1);
        T._weight_norm_interface(W, W[:, :1].contiguous())[0]; T._weight_norm_interface(W, W[:1], 1)[0];
        T._weight_norm_interface(W.reshape(16, 4, 2), W[:, :1, None].contiguous())[1]
    """,
    "bags": """
        F.embedding_bag(ids, W); F.embedding_bag(ids, W, mode='sum', per_sample_weights=x[:, :4]);
        F.embedding_bag(ids, W, mode='max', padding_idx=0); F.embedding_bag(ids[0], W, ids[1].clamp(0, 0).cumsum(0));
        F.embedding_bag(ids[0], W, T.tensor([0, 1, 4]), include_last_offset=True)
    """,
    "matrices": """
        T.addbmm(v[0] @ v[0].T, v, v.mT); T.addr(W[:8], x[0], x[1]); T.trace(x); T.block_diag(x, W); T.kron(W, W[:2]);
        T.cartesian_prod(x[0], x[1]); T.vdot(x[0], x[1]); T.ger(x[0], x[1]); T.dist(x, x[:1]); T.renorm(x, 2, 0, 1.0);
        T.linalg.inv(im + 4 * T.eye(8)); T.inverse(im + 4 * T.eye(8)); T.linalg.det(im); T.det(im);
        T.linalg.solve(im + 4 * T.eye(8), v.mT[:1]); T.linalg.solve(im[:, 0] + 4 * T.eye(8), v.mT);
        T.linalg.solve(im[:, 0] + 4 * T.eye(8), v, left=False)
    """,
    "special": """
        T.hypot(x, x[:1]); T.heaviside(x, x[:1]); T.ldexp(x, x[:1]); T.deg2rad(x); T.rad2deg(x); T.msort(x);
        T.mode(x)[0]; T.gcd(ids, ids[:1]); T.special.entr(x); T.nanmedian(x); T.nanmedian(x, -1)[0]; T.lgamma(x);
        T.digamma(x); T.i0(x); T.signbit(x); T.dstack([x, x]); T.atleast_1d(x); T.atleast_2d(x[0]); T.atleast_3d(x);
        T.atleast_1d(x[0, 0], x)[0]; T.atleast_2d(x[0], x)[0]; T.atleast_3d(x[0], x)[0]; T.logspace(0, 1, 4);
        T.unsafe_chunk(x, 2, -1)[0]; T.unsafe_split(x, 4, -1)[0]; T.unsafe_split_with_sizes(x, [3, 5], -1)[0]
    """,
}
