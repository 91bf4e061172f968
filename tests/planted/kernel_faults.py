"""Faults of the kernels: tiles, masks, sums, codes, pages and the words of one SIMD build."""
from tests.planted.fault import Fault

BEST = "avx512_bf16"

FAULTS = [
    # masks and what changes scores
    Fault(
        "edge-missed", "cyflash/cpu/kernel.pxi",
        "causal hides the last key of a tile from its first row, and the tile counts as wholly visible",
        "position + x.right < end - 1", "position + x.right < end - 2",
        "tails property attention options invariance", BEST,
    ),
    Fault(
        "window-left", "cyflash/cpu/change.pxi",
        "the left side of a window is one key too short",
        "vf_set(relative(position - x.left))", "vf_set(relative(position - x.left + 1))",
        "options attention", BEST,
    ),
    Fault(
        "softcap-after", "cyflash/cpu/change.pxi",
        "softcap is applied after ALiBi",
        "    if soft:\n        y = vf_mul(lines.cap, tanhv(vf_mul(y, lines.per_cap)))\n    if sloped:\n"
        "        y = vf_fma(lines.slope, vf_abs(vf_sub(lines.place, key)), y)\n",
        "    if sloped:\n        y = vf_fma(lines.slope, vf_abs(vf_sub(lines.place, key)), y)\n    if soft:\n"
        "        y = vf_mul(lines.cap, tanhv(vf_mul(y, lines.per_cap)))\n",
        "options", BEST,
    ),
    Fault(
        "alibi-sign", "cyflash/cpu/few_weights.pxi",
        "where rows are few, ALiBi adds what it is to take away",
        "lines.slope = vf_set(-panel.slope[r])", "lines.slope = vf_set(panel.slope[r])",
        "options kvcache_attention split", BEST,
    ),
    Fault(
        "mask-of-first-head", "cyflash/cpu/change.pxi",
        "heads that share a panel share the mask of the first, if it is one row for each",
        "return stride[1] == 0 and (panel.heads == 1 or stride[0] == 0)", "return stride[1] == 0",
        "options kvcache_attention split", BEST,
    ),
    Fault(
        "step-of-heads", "cyflash/cpu/kernel.pxi",
        "rows of the second head of a panel stand where its first row does",
        "panel.step[r] = panel.step[r - panel.rows]", "panel.step[r] = 0.0",
        "split options attention", BEST,
    ),
    Fault(
        "slope-of-first-head", "cyflash/cpu/kernel.pxi",
        "heads that share a panel share the ALiBi slope of the first",
        "head.slopes[r // panel.rows * x.slopes_stride]", "head.slopes[0]",
        "options split attention", BEST,
    ),
    Fault(
        "sink-of-first-head", "cyflash/cpu/kernel.pxi",
        "heads that share a panel share the sink of the first",
        "head.sinks + g * x.sinks_stride if head.sinks", "head.sinks if head.sinks",
        "options split attention", BEST,
    ),
    Fault(
        "sink-twice", "cyflash/cpu/kernel.pxi",
        "the sink is added for the row and once more for its own place in the denominator",
        "(exp(sink[0] - top) if sink[0] != top else 1.0)", "2.0 * (exp(sink[0] - top) if sink[0] != top else 1.0)",
        "options attention", BEST,
    ),
    Fault(
        "gqa-heads", "cyflash/cpu/driver.pxi",
        "query heads go round the kv heads instead of in groups",
        "head.kv, head.h = h // x.group, h", "head.kv, head.h = h % (x.H // x.group), h",
        "attention options", BEST,
    ),
    # sums
    Fault(
        "few-rescale", "cyflash/cpu/few_weights.pxi",
        "where rows are few, the denominator of earlier blocks is not rescaled to the new maximum",
        "vf_store(panel.l, vf_fma(vf_load(panel.l), weight, vf_load(sums)))",
        "vf_store(panel.l, vf_add(vf_load(panel.l), vf_load(sums)))",
        "split attention kvcache_attention", BEST,
    ),
    Fault(
        "long-sum", "cyflash/cpu/product.pxi",
        "the second part of a long head dimension overwrites the first where that is short",
        "                    if d > 0:\n", "                    if d > LONGEST_SUM - 1:\n",
        "tails attention", BEST,
    ),
    Fault(
        "chunk-weight", "cyflash/cpu/driver.pxi",
        "chunks of keys are merged with denominators that lack their weight",
        "l += <double> part[0] * part[1]", "l += <double> part[1]",
        "split kvcache_attention", BEST,
    ),
    Fault(
        "chunk-lift", "cyflash/cpu/driver.pxi",
        "the LSE of merged chunks lacks what subtracting the mean of the keys took from it",
        "        m, first[2], l, head.sinks,", "        m, 0.0, l, head.sinks,",
        "split int8_options kvcache_attention", BEST,
    ),
    Fault(
        "softcap-mean", "cyflash/cpu/int8.pxi",
        "with softcap, the product with the mean of the keys is dropped, not added to the score",
        "vf_store(panel.shift + row, sum if x.softcap != 0.0 else vf_set(0.0))",
        "vf_store(panel.shift + row, vf_set(0.0))",
        "int8_options", BEST,
    ),
    Fault(
        "rounded-denominator", "cyflash/cpu/int8.pxi",
        "denominators are summed from the rounded weights",
        "        for i in range(ROWS // 2):\n            x[i] = vf_add(x[i], x[i + ROWS // 2])\n",
        "        for i in range(ROWS):\n"
        "            x[i] = vf_sub(vf_add(x[i], vf_set(12582912.0)), vf_set(12582912.0))\n"
        "        for i in range(ROWS // 2):\n            x[i] = vf_add(x[i], x[i + ROWS // 2])\n",
        "int8_options int8_codes int8_sums int8_accuracy", BEST,
    ),
    Fault(
        "stale-rows", "cyflash/cpu/kernel.pxi",
        "the rows of a last group of keys keep the scores of the block before",
        "    for c in range(end * PANEL, high * PANEL):\n        s[c] = -INFINITY\n", "",
        "tails attention", BEST,
    ),
    # NaN
    Fault(
        "hidden-nan", "cyflash/cpu/kernel.pxi",
        "NaN in hidden values reaches the rows that do not see them",
        "end, precise, scratch, careful and changed)", "end, precise, scratch, False)",
        "special_values", BEST,
    ),
    Fault(
        "window-nan", "cyflash/cpu/driver.pxi",
        "only causal is thought to hide values, not the left side of a window",
        "x.left < length or x.right < length)", "x.right < length)",
        "special_values", BEST,
    ),
    # pages and codes
    Fault(
        "page-of-block", "cyflash/cpu/block.pxi",
        "pages are thought to begin where blocks do: keys beyond the end of a page are read",
        "rows.size - (first + low) % rows.size", "rows.size - low % rows.size",
        "paged kvcache_attention", BEST,
    ),
    Fault(
        "skipped-in-scale", "cyflash/cpu/quantise.pxi",
        "keys that stay in float32 count for the scale of their head",
        "            if r >= skipped:\n", "            if r >= 0:\n",
        "quantise int8_codes quantized", BEST,
    ),
    Fault(
        "saturation-limit", "cyflash/cpu/quantise.pxi",
        "what rounds to 127 is counted as saturated",
        "limit = vf_set(127.5)", "limit = vf_set(127.0)",
        "watch quantise", BEST,
    ),
    # memory
    Fault(
        "offset-of-32-bits", "cyflash/cpu/driver.pxi",
        "the place of a head's queries is an int",
        "sequence.q + h * x.q_stride[0] if", "sequence.q + <int> (h * x.q_stride[0]) if",
        "large", BEST,
    ),
    Fault(
        "tail-beyond", "cyflash/cpu/floats.pxi",
        "the rest of a row is read as a whole vector",
        "    return vf_load_part(<const float*> p, n)", "    return vf_load(<const float*> p)",
        "guarded_tails", BEST,
    ),
    Fault(
        "unaligned-room", "cyflash/cpu/driver.pxi",
        "the scratch is aligned, but has no room for that",
        "partial) * <Py_ssize_t> sizeof(float) + 64", "partial) * <Py_ssize_t> sizeof(float)",
        "guarded_tails", BEST,
    ),
    Fault(
        "room-of-chunks", "cyflash/cpu/driver.pxi",
        "what chunks of keys leave has no room in the scratch",
        "total = (threads * size + partial) *", "total = (threads * size) *",
        "split kvcache_attention", BEST,
    ),
    # the words of one build
    Fault(
        "code-minus-128", "cyflash/cpu/simd/avx512.h",
        "static scales saturate at -128, on the AVX-512 builds alone",
        "vf_max(x, vf_set(-127.0f))", "vf_max(x, vf_set(-128.0f))",
        "quantise quantized int8_codes", BEST,
    ),
    Fault(
        "code-tail", "cyflash/cpu/simd/avx512.h",
        "a tail of codes writes one byte more than it has",
        "_mm_mask_storeu_epi8(p, first_lanes(n), codes_of(x))",
        "_mm_mask_storeu_epi8(p, first_lanes(n + 1), codes_of(x))",
        "quantise quantized int8_tails", BEST,
    ),
    Fault(
        "bf16-half-up", "cyflash/cpu/simd/avx512.h",
        "bfloat16 is rounded half up, not half to even, on the AVX-512 builds alone",
        "WORD __m256i to_bf16(vf x) {\n    __m512i u = _mm512_castps_si512(x), "
        "odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));",
        "WORD __m256i to_bf16(vf x) {\n    __m512i u = _mm512_castps_si512(x), odd = _mm512_set1_epi32(1);",
        "convert half", BEST,
    ),
    Fault(
        "fp16-overflow", "cyflash/cpu/simd/avx512.h",
        "float16 is rounded towards 0: 65520 becomes 65504, not infinity",
        "_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)", "_mm512_cvtps_ph(x, _MM_FROUND_TO_ZERO)",
        "convert half", BEST,
    ),
    Fault(
        "avx2-hidden-weight", "cyflash/cpu/simd/avx2.h",
        "the weight of a hidden key is 2^-100, not 0, on the AVX2 builds alone",
        "return _mm256_floor_ps(_mm256_max_ps(_mm256_set1_ps(-200.0f), x));",
        "return _mm256_floor_ps(_mm256_max_ps(_mm256_set1_ps(-100.0f), x));",
        "special_values attention", "avx2",
    ),
    Fault(
        "avx2-mask-tail", "cyflash/cpu/simd/avx2.h",
        "the tail of a mask reads one byte too few, on the AVX2 builds alone",
        "memcpy(&bytes, p, (size_t)n);", "memcpy(&bytes, p, (size_t)(n < 8 ? n - 1 : n));",
        "tails options", "avx2",
    ),
    Fault(
        "avx2-max-lanes", "cyflash/cpu/simd/avx2.h",
        "the greatest lane is looked for in the lower half alone, on the AVX2 builds alone",
        "__m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));",
        "__m128 x = _mm256_castps256_ps128(a);",
        "split attention kvcache_attention", "avx2",
    ),
]
