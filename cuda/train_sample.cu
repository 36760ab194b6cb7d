// Which anchors enter the loss: the miners of src/train/sampler.rs, which choose the same anchors from the same seeds.
//
// The host's generator is SplitMix64, whose numbers follow from their places alone. Its draws without replacement are the first steps of a
// Fisher-Yates shuffle: what a step takes follows from the steps before it that chose the same place (`shuffled`), which threads find
// for themselves in lists of those.
#include "common.cuh"

// As `IGNORED_OVERLAP`: of a background anchor whose decoded box overlaps a face so much nothing is learnt.
const float IGNORED_OVERLAP = 0.5f;
// As `WRS_EPSILON`.
const float WRS_EPSILON = 1e-6f;
// Miners.
const int ALL = 0, OHEM = 2, WRS = 3, BALANCED = 4, FOCAL = 5;

// Anchors of a choice, and how many of them are taken.
struct Choice {
    u32 positives, negatives, take_positives, take_negatives;
};

struct SampleArgs {
    Anchors anchors;
    const u64 *seeds; // of every picture
    const float *values;
    // Of every anchor of every picture. `label` gets the mined anchors' faces (`mined`, with `overlap` as the mining leaves it).
    int *label;
    const int *mined;
    const float *overlap;
    float *hardness; // -ln p_t
    // A choice's positives from its range's front, its negatives from its end, both rising away from there; with each place keys or
    // what `shuffled` needs.
    u32 *list, *keys, *heads, *nexts;
    u8 *chosen;
    Choice *choices; // of every picture's ranges
    Weight *weights;
    u64 samples, ratio, each;
    float min_loss, alpha, gamma;
    int miner, grouped, sum, two_logits;
};

DEVICE u32 ranges_of(const SampleArgs &a) { return a.grouped ? a.anchors.group_count : 1; }
DEVICE u32 first_of(const SampleArgs &a, u32 range) { return a.grouped ? a.anchors.groups[range].first : 0; }
DEVICE u32 length_of(const SampleArgs &a, u32 range) { return a.grouped ? a.anchors.groups[range].cells : a.anchors.count; }

// What the mining found goes into the labels (`Mined::relabel`); what the miners look at, whatever the loss.
KERNEL(sample_prepare, SampleArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (i >= a.anchors.count)
        return;
    i64 at = (i64)n * a.anchors.count + i;
    int label = a.label[at];
    if (a.mined[at] >= 0)
        label = a.mined[at];
    else if (label == BACKGROUND && a.overlap[at] >= IGNORED_OVERLAP)
        label = IGNORED;
    a.label[at] = label;
    a.chosen[at] = 0;
    const AnchorGroup &g = a.anchors.groups[group_of(a.anchors, i)];
    const float *logit = a.values + g.logits + n * g.logit_picture + (i64)(i - g.first) * g.logit_cell;
    float x = a.two_logits ? logit[1] - logit[0] : logit[0];
    // -ln sigmoid(x) of a face, -ln(1 - sigmoid(x)) of any other.
    float l = log1pf(expf(x >= 0.0f ? -x : x));
    float face = x >= 0.0f ? l : __fsub_rn(l, x), other = x >= 0.0f ? __fadd_rn(x, l) : l;
    a.hardness[at] = label >= 0 ? face : other;
}

DEVICE u64 least_of(u64 l, u64 r) { return l < r ? l : r; }

// How many of a choice's anchors are taken (`SamplerRecipe::quota`).
DEVICE Choice quota(const SampleArgs &a, u32 positives, u32 negatives)
{
    u64 p = positives, n = negatives;
    if (a.miner == ALL || (a.miner == FOCAL && a.samples == 0)) {
    } else if (a.miner == BALANCED && !a.grouped) {
        p = least_of(p, a.each);
        n = least_of(n, a.each);
    } else if (a.samples == 0) {
        u64 each = p > 0 ? p : 1;
        // Without a product that overflows.
        n = a.ratio >= n ? n : least_of(n, a.ratio * each);
    } else {
        u64 wanted = a.samples / (a.ratio + 1);
        wanted = least_of(wanted > 0 ? wanted : 1, p);
        n = least_of(n, a.samples - wanted);
        p = least_of(p, a.samples - n);
    }
    Choice c = {positives, negatives, (u32)p, (u32)n};
    return c;
}

// Lists a range's positives and negatives in order of their numbers. A block a range and picture.
KERNEL(sample_list, SampleArgs, 256)
{
    u32 *counts = (u32 *)shared_bytes(); // of every warp: positives, negatives
    u32 range = blockIdx.x, n = blockIdx.y, first = first_of(a, range), length = length_of(a, range);
    i64 base = (i64)n * a.anchors.count;
    u32 *front = a.list + base + first, *back = front + length;
    u32 warp = threadIdx.x / 32, before = (1u << threadIdx.x % 32) - 1;
    u32 positives = 0, negatives = 0;
    for (u32 begin = 0; begin < length; begin += 256) {
        u32 k = begin + threadIdx.x;
        bool positive = false, negative = false;
        if (k < length) {
            i64 at = base + first + k;
            int label = a.label[at];
            // A loss of NaN is not below anything: it stays, and shows in the sum.
            bool dropped = a.miner == BALANCED && a.min_loss > 0.0f && a.hardness[at] < a.min_loss;
            positive = !dropped && label >= 0;
            negative = !dropped && label == BACKGROUND;
        }
        u32 p = __ballot_sync(0xffffffffu, positive), m = __ballot_sync(0xffffffffu, negative);
        if (threadIdx.x % 32 == 0) {
            counts[warp * 2] = (u32)__popc(p);
            counts[warp * 2 + 1] = (u32)__popc(m);
        }
        __syncthreads();
        u32 to_front = positives, to_back = negatives;
        for (u32 w = 0; w < 8; w++) {
            to_front += w < warp ? counts[w * 2] : 0;
            to_back += w < warp ? counts[w * 2 + 1] : 0;
            positives += counts[w * 2];
            negatives += counts[w * 2 + 1];
        }
        if (positive)
            front[to_front + (u32)__popc(p & before)] = first + k;
        if (negative)
            *(back - 1 - (to_back + (u32)__popc(m & before))) = first + k;
        __syncthreads();
    }
    if (threadIdx.x == 0)
        a.choices[n * ranges_of(a) + range] = quota(a, positives, negatives);
}

// Numbers that choosing `take` of `count` anchors takes from the generator.
DEVICE u64 draws_of(const SampleArgs &a, u32 count, u32 take)
{
    if (take >= count || take == 0 || a.miner == OHEM)
        return 0;
    return a.miner == WRS ? count : take;
}

// The generator's number at a place, from 0 (`Rng::bits`).
DEVICE u64 splitmix(u64 seed, u64 place)
{
    u64 z = seed + (place + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

// One side of a choice: entry k of an array that has a place for each of a range's anchors.
struct Side {
    i64 from;
    int step;
};
DEVICE i64 entry(const Side &s, u32 k) { return s.from + (i64)s.step * k; }

// Marks the `take` entries with the highest keys, of equal ones those that come first. Eight bits at a time of key and place, the
// values are found of which enough are at least as high.
DEVICE void choose_highest(const SampleArgs &a, const Side &side, i64 base, u32 count, u32 take)
{
    u32 *bins = (u32 *)shared_bytes(), *found = bins + 256;
    u64 prefix = 0, mask = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        bins[threadIdx.x] = 0;
        __syncthreads();
        for (u32 k = threadIdx.x; k < count; k += 256) {
            u64 key = (u64)a.keys[entry(side, k)] << 32 | (u32)~k;
            if ((key & mask) == prefix)
                atomicAdd(&bins[key >> shift & 255], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 bin = 255;
            for (; bins[bin] < take; bin--)
                take -= bins[bin];
            found[0] = bin;
            found[1] = take;
        }
        __syncthreads();
        prefix |= (u64)found[0] << shift;
        mask |= (u64)255 << shift;
        take = found[1];
        __syncthreads();
    }
    for (u32 k = threadIdx.x; k < count; k += 256)
        if (((u64)a.keys[entry(side, k)] << 32 | (u32)~k) >= prefix)
            a.chosen[base + a.list[entry(side, k)]] = 1;
}

// The entry that step `step` of the shuffle takes. It takes what lies at the place it chose; that was put there by the last step before
// it that chose the same place, which put there what had lain at its own, and so on.
DEVICE u32 shuffled(const SampleArgs &a, const Side &side, u32 step)
{
    u32 place = a.keys[entry(side, step)];
    while (true) {
        u32 last = 0; // steps count from 1 in the lists
        for (u32 s = a.heads[entry(side, place)]; s > 0; s = a.nexts[entry(side, s - 1)])
            if (s - 1 < step && s > last)
                last = s;
        if (last == 0)
            return place;
        place = step = last - 1;
    }
}

// Marks `take` entries drawn at random, with the generator's numbers from `drawn` on.
DEVICE void choose_random(const SampleArgs &a, const Side &side, i64 base, u32 count, u32 take, u64 seed, u64 drawn)
{
    for (u32 k = threadIdx.x; k < count; k += 256)
        a.heads[entry(side, k)] = 0;
    __syncthreads();
    for (u32 k = threadIdx.x; k < take; k += 256) {
        u32 place = k + (u32)__umul64hi(splitmix(seed, drawn + k), (u64)(count - k));
        a.keys[entry(side, k)] = place;
        a.nexts[entry(side, k)] = atomicExch(&a.heads[entry(side, place)], k + 1);
    }
    __syncthreads();
    for (u32 k = threadIdx.x; k < take; k += 256)
        a.chosen[base + a.list[entry(side, shuffled(a, side, k))]] = 1;
}

// Chooses a range's positives (even blocks) or negatives (odd ones).
KERNEL(sample_choose, SampleArgs, 256)
{
    u32 range = blockIdx.x / 2, n = blockIdx.y, first = first_of(a, range), length = length_of(a, range);
    bool negatives = blockIdx.x % 2 == 1;
    i64 base = (i64)n * a.anchors.count;
    const Choice *choices = a.choices + n * ranges_of(a);
    u64 drawn = 0;
    for (u32 r = 0; r <= range; r++) {
        Choice c = choices[r];
        if (r < range || negatives)
            drawn += draws_of(a, c.positives, c.take_positives);
        if (r < range)
            drawn += draws_of(a, c.negatives, c.take_negatives);
    }
    Choice c = choices[range];
    u32 count = negatives ? c.negatives : c.positives, take = negatives ? c.take_negatives : c.take_positives;
    Side side = {base + first + (negatives ? (i64)length - 1 : 0), negatives ? -1 : 1};
    if (take == 0)
        return;
    if (take >= count) {
        for (u32 k = threadIdx.x; k < count; k += 256)
            a.chosen[base + a.list[entry(side, k)]] = 1;
        return;
    }
    if (a.miner == OHEM || a.miner == WRS) {
        for (u32 k = threadIdx.x; k < count; k += 256) {
            float key = a.hardness[base + a.list[entry(side, k)]];
            if (a.miner == WRS) {
                double r = ((double)(splitmix(a.seeds[n], drawn + k) >> 11) + 0.5) / 9007199254740992.0;
                key = (float)(log(r) / (double)__fadd_rn(key, WRS_EPSILON));
            }
            a.keys[entry(side, k)] = ascending(key);
        }
        choose_highest(a, side, base, count, take);
    } else {
        choose_random(a, side, base, count, take, a.seeds[n], drawn);
    }
}

// What the chosen anchors' losses weigh. A block a range and picture.
KERNEL(sample_weigh, SampleArgs, 256)
{
    double *sums = (double *)shared_bytes();
    u32 range = blockIdx.x, n = blockIdx.y, first = first_of(a, range), length = length_of(a, range);
    double sum = 0.0;
    if (a.miner == FOCAL)
        for (u32 k = threadIdx.x; k < length; k += 256) {
            i64 at = (i64)n * a.anchors.count + first + k;
            if (!a.chosen[at])
                continue;
            // alpha_t (1 - p_t)^gamma.
            float alpha = a.label[at] >= 0 ? a.alpha : 1.0f - a.alpha;
            sum += (double)(alpha * powf(fmaxf(-expm1f(-a.hardness[at]), 0.0f), a.gamma));
        }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (u32 half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half)
            sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x != 0)
        return;
    Choice c = a.choices[n * ranges_of(a) + range];
    auto share = [&](u32 count) { return a.sum ? 1.0f : __fdiv_rn(1.0f, (float)(count > 0 ? count : 1)); };
    Weight w = {share(c.take_positives + c.take_negatives), share(c.take_positives)};
    // Of a group learnt to perfection nothing is left to weigh.
    if (a.miner == FOCAL)
        w.logit = (float)(1.0 / (sums[0] > 1e-6 ? sums[0] : 1e-6));
    a.weights[n * ranges_of(a) + range] = w;
}
