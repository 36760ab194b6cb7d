// What a block of 1,024 threads does with a list of boxes in descending score: the best of those that overlap stay (nms.rs of src/detect).
#pragma once

// Threads of the blocks that work on what was decoded. One a multiprocessor is enough: without that bound registers would be spilled so
// that two fit.
const u32 BLOCK = 1024;

struct __align__(16) Box {
    float x1, y1, x2, y2;
};

// Sums of the values of a warp's lanes up to each, its own included.
DEVICE u32 sums_through(u32 v)
{
    u32 lane = threadIdx.x % 32;
    for (u32 by = 1; by < 32; by *= 2) {
        u32 other = __shfl_up_sync(0xffffffffu, v, by);
        v += lane >= by ? other : 0;
    }
    return v;
}

// Threads of the block before this one for which `yes` is true, and how many there are in all. `of_warps`: 32 words that all have
// stopped to use; afterwards too.
DEVICE u32 count_before(bool yes, u32 *of_warps, u32 *total)
{
    u32 votes = __ballot_sync(0xffffffffu, yes), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0)
        of_warps[warp] = (u32)__popc(votes);
    __syncthreads();
    u32 sums = sums_through(of_warps[lane]);
    u32 before = __shfl_sync(0xffffffffu, sums, warp ? (int)warp - 1 : 0);
    *total = __shfl_sync(0xffffffffu, sums, 31);
    __syncthreads();
    return (warp ? before : 0) + (u32)__popc(votes & ((1u << lane) - 1));
}

// Moves the entries of those threads that have one to the front: no two to one place, none to behind where it was or to where an
// earlier call left one. All threads of the block come.
template <class T> DEVICE void move(T *all, bool has, u32 from, u32 to)
{
    for (u32 part = 0; part < sizeof(T) / 16; part++) {
        Vec16 v;
        if (has)
            v = ((const Vec16 *)(all + from))[part];
        __syncthreads();
        if (has)
            ((Vec16 *)(all + to))[part] = v;
    }
}

DEVICE float area_of(const Box &b, float extra) { return __fmul_rn(b.x2 - b.x1 + extra, b.y2 - b.y1 + extra); }

// Whether two boxes overlap by more than `iou` (`Convention::exceeds`).
DEVICE bool exceeds(const Box &l, float area_l, const Box &r, float area_r, float extra, float iou)
{
    float w = fminf(l.x2, r.x2) - fmaxf(l.x1, r.x1) + extra, h = fminf(l.y2, r.y2) - fmaxf(l.y1, r.y1) + extra;
    float shared = __fmul_rn(fmaxf(w, 0.0f), fmaxf(h, 0.0f));
    return shared > __fmul_rn(iou, area_l + area_r - shared);
}

struct SuppressShared {
    Box boxes[BLOCK];
    float areas[BLOCK];
    u32 rows[32];
    u32 of_warps[32];
};

// Greedy suppression of the `n` sorted entries of `result`, which begin with a box, by one block, which leaves at its front those that
// stay, at most `room`; how many. An overlap above `iou` suppresses; `extra` is added to widths and heights.
//
// A thousand at a time, a thread each: those that overlap one kept before go. Of what is left, the best 32 are compared with each
// other; those of them that stay are compared with all others, and the next 32 are taken.
template <class T> DEVICE u32 suppress(T *result, u32 n, float iou, float extra, u32 room, SuppressShared &s)
{
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, kept = 0;
    for (u32 first = 0; first < n && room; first += BLOCK) {
        u32 i = first + threadIdx.x;
        bool open = i < n, keep = false;
        Box b = {0.0f, 0.0f, 0.0f, 0.0f};
        if (open)
            b = *(const Box *)result[i].box;
        float area = area_of(b, extra);
        for (u32 from = 0; from < kept; from += BLOCK) {
            __syncthreads();
            if (from + threadIdx.x < kept) {
                Box k = *(const Box *)result[from + threadIdx.x].box;
                s.boxes[threadIdx.x] = k;
                s.areas[threadIdx.x] = area_of(k, extra);
            }
            __syncthreads();
            u32 count = kept - from < BLOCK ? kept - from : BLOCK;
            for (u32 k = 0; open && k < count; k++)
                open = !exceeds(b, area, s.boxes[k], s.areas[k], extra, iou);
        }
        while (room) {
            u32 total, at = count_before(open, s.of_warps, &total);
            if (total == 0)
                break;
            u32 count = total < 32 ? total : 32;
            if (open && at < count) {
                s.boxes[at] = b;
                s.areas[at] = area;
            }
            __syncthreads();
            // Row `warp`: which of those behind it overlap it.
            bool hit = lane > warp && lane < count && exceeds(s.boxes[lane], s.areas[lane], s.boxes[warp], s.areas[warp], extra, iou);
            u32 row = __ballot_sync(0xffffffffu, hit);
            if (lane == 0)
                s.rows[warp] = row;
            __syncthreads();
            u32 left = count == 32 ? 0xffffffffu : (1u << count) - 1, chosen = 0;
            for (; left && room; room--) {
                int best = __ffs(left) - 1;
                chosen |= 1u << best;
                left &= ~(s.rows[best] | 1u << best);
            }
            if (open && at < count) {
                keep = chosen >> at & 1;
                open = false;
            }
            for (u32 rest = chosen; open && rest; rest &= rest - 1) {
                int k = __ffs(rest) - 1;
                open = !exceeds(b, area, s.boxes[k], s.areas[k], extra, iou);
            }
        }
        u32 total, at = kept + count_before(keep, s.of_warps, &total);
        move(result, keep, i, at);
        kept += total;
        __syncthreads();
    }
    return kept;
}
