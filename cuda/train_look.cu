// The boxes that a training looks at a second time: `SecondLook::choose` of src/train/objective/second_look, the same boxes with the same
// labels and weights, in the same order.
//
// What the outputs propose is ordered and suppressed; faces join it, and each box gets a slot of its picture, as many for every picture, of
// which what is left over stays empty. Slots are matched and sampled as anchors are (train_match.cu, train_sample.cu); then those that
// count become the rows that the network's second phase takes, without any between them.
#include "common.cuh"
#include "suppress.cuh"

// Where the candidates of an anchor group come in the host's order of a picture's, and which of the network's inputs of boxes they are for.
struct Turn {
    u32 first, step; // the first cell's; from a cell's to the next one's
    u32 input;
};

// A box in that order, or a face.
struct __align__(16) Found {
    float box[4];
    u32 input;
    u32 unused[3];
};

struct ProposeArgs {
    Anchors anchors;          // of which every picture's outputs say something
    const AnchorGroup *first; // what a first step says of them; none: there is no first step
    const Turn *turns;        // of every group
    const float *values;      // the outputs
    // Of every picture's candidates in the host's order: what orders them, 0 of none; the boxes.
    u64 *keys;
    Found *found;
    // Of every picture the best of them, in any order; in descending order; how many.
    u64 *best;
    Found *sorted;
    u32 *held;
    const Found *faces; // that are to be found, picture by picture
    const u32 *starts;  // the first of each picture, and the end
    const float *scales; // by which slots are in ranges; none: all are one range
    // Of every slot of every picture; where it is empty no number, and 0.
    Rect *boxes;
    u32 *inputs;
    u8 *filled;
    u32 scale_count, capacity; // ranges, and slots of each
    u32 before, proposals;     // most candidates that enter the suppression; most that stay
    float overlap;             // above which the weaker goes
    float survives;            // least logit of a first step, not counted
    float least, reach;        // least logit, not counted; how far a box may reach from its cell's centre, 0: anywhere
    int pair;        // two logits: the score is their difference's sigmoid, else the logit itself
    int faces_first; // and counted among the proposals, rather than behind them
};

// Every candidate's box and key. A thread an anchor.
KERNEL(look_decode, ProposeArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (i >= a.anchors.count)
        return;
    u32 group = group_of(a.anchors, i);
    const AnchorGroup &g = a.anchors.groups[group];
    u32 cell = i - g.first, order = a.turns[group].first + cell * a.turns[group].step;
    const float *logit = a.values + g.logits + n * g.logit_picture + (i64)cell * g.logit_cell;
    float score = a.pair ? __fsub_rn(logit[1], logit[0]) : logit[0];
    // False for a NaN too.
    bool found = a.pair ? score > a.least : score == score;
    AnchorBox anchor = anchor_on(g, cell);
    if (a.first) {
        const AnchorGroup &f = a.first[group];
        found = found && passes_on(a.values, f, n, cell, a.survives);
        if (f.parts & HAS_BOXES)
            anchor = moved_on(a.values, f, n, cell);
    }
    float t[4];
    offsets_on(a.values, g, n, cell, t);
    Rect b = decode_on(anchor, t, 1.0f, 1.0f);
    // As detection cuts proposals: what is no number stays one.
    if (a.reach > 0.0f && is_number(b.x2 - b.x1) && is_number(b.y2 - b.y1)) {
        b.x1 = fmaxf(b.x1, __fsub_rn(anchor.x, a.reach));
        b.y1 = fmaxf(b.y1, __fsub_rn(anchor.y, a.reach));
        b.x2 = fminf(b.x2, __fadd_rn(anchor.x, a.reach));
        b.y2 = fminf(b.y2, __fadd_rn(anchor.y, a.reach));
    }
    if (a.pair)
        score = __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-score)));
    i64 at = (i64)n * a.anchors.count + order;
    a.keys[at] = found && !is_empty(b) ? (u64)ascending(score) << 32 | (u32)~order : 0;
    Found to = {{b.x1, b.y1, b.x2, b.y2}, a.turns[group].input, {0, 0, 0}};
    a.found[at] = to;
}

struct BestShared {
    u32 bins[256];
    u32 of_warps[32];
    u32 found[2];
};

// The best `before` of a picture's candidates. A block a picture. Eight bits of the keys at a time, the value is found of which enough
// are at least as high.
KERNEL(look_best, ProposeArgs, 1024)
{
    BestShared &s = *(BestShared *)shared_bytes();
    u32 n = blockIdx.x, count = a.anchors.count, take = a.before;
    const u64 *keys = a.keys + (i64)n * count;
    u64 least = 0, mask = 0;
    for (int shift = 56; shift >= 0 && a.before < count; shift -= 8) {
        if (threadIdx.x < 256)
            s.bins[threadIdx.x] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < count; i += BLOCK)
            if ((keys[i] & mask) == least)
                atomicAdd(&s.bins[keys[i] >> shift & 255], 1u);
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 bin = 255;
            for (; s.bins[bin] < take; bin--)
                take -= s.bins[bin];
            s.found[0] = bin;
            s.found[1] = take;
        }
        __syncthreads();
        least |= (u64)s.found[0] << shift;
        mask |= (u64)255 << shift;
        take = s.found[1];
        __syncthreads();
    }
    u32 held = 0;
    for (u32 first = 0; first < count; first += BLOCK) {
        u32 i = first + threadIdx.x;
        u64 key = i < count ? keys[i] : 0;
        // No two keys are equal, but for those of none.
        bool keep = key != 0 && key >= least;
        u32 total, at = held + count_before(keep, s.of_warps, &total);
        if (keep)
            a.best[(i64)n * a.before + at] = key;
        held += total;
    }
    if (threadIdx.x == 0)
        a.held[n] = held;
}

// Sorts them: a thread finds the rank of one by comparing it with all.
KERNEL(look_rank, ProposeArgs, 256)
{
    u64 *shared = (u64 *)shared_bytes();
    u32 n = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x, held = a.held[n], rank = 0;
    const u64 *best = a.best + (i64)n * a.before;
    u64 own = i < held ? best[i] : 0;
    for (u32 first = 0; first < held; first += 256) {
        u32 k = first + threadIdx.x;
        shared[threadIdx.x] = k < held ? best[k] : 0;
        __syncthreads();
        for (u32 j = 0; j < 256; j++)
            rank += shared[j] > own;
        __syncthreads();
    }
    if (i < held)
        a.sorted[(i64)n * a.before + rank] = a.found[(i64)n * a.anchors.count + number_of(own)];
}

// The reference scale that is nearest in octaves (`reference_scale`), the first of equal ones.
DEVICE u32 range_of(const ProposeArgs &a, const float box[4])
{
    float w = fmaxf(__fsub_rn(box[2], box[0]), 0.0f), h = fmaxf(__fsub_rn(box[3], box[1]), 0.0f);
    float side = fmaxf(sqrtf(__fmul_rn(w, h)), 1.17549435e-38f), least = 0.0f;
    u32 range = 0;
    for (u32 k = 0; k < a.scale_count; k++) {
        float octaves = fabsf(log2f(__fdiv_rn(side, a.scales[k])));
        if (k == 0 || octaves < least) {
            least = octaves;
            range = k;
        }
    }
    return range;
}

// Suppresses a picture's best candidates, and gives those that stay and the picture's faces their slots: in each range as they come, from
// its first on. A block a picture.
KERNEL(look_choose, ProposeArgs, 1024)
{
    SuppressShared &s = *(SuppressShared *)shared_bytes();
    u32 n = blockIdx.x, start = a.starts[n], faces = a.starts[n + 1] - start, room = a.proposals;
    if (a.faces_first)
        room = faces < room ? room - faces : 0;
    Found *sorted = a.sorted + (i64)n * a.before;
    u32 kept = suppress(sorted, a.held[n], a.overlap, 0.0f, room, s);
    __syncthreads();
    u32 front = a.faces_first ? faces : kept, count = faces + kept;
    if (a.faces_first && count > a.proposals)
        count = a.proposals;
    u32 ranges = a.scale_count ? a.scale_count : 1;
    for (u32 range = 0; range < ranges; range++) {
        u32 filled = 0;
        for (u32 first = 0; first < count; first += BLOCK) {
            u32 k = first + threadIdx.x;
            bool own = k < count;
            Found box = {};
            if (own) {
                bool is_face = (k < front) == (a.faces_first != 0);
                u32 j = k < front ? k : k - front;
                box = is_face ? a.faces[start + j] : sorted[j];
                own = !a.scale_count || range_of(a, box.box) == range;
            }
            u32 total, to = filled + count_before(own, s.of_warps, &total);
            if (own) {
                i64 at = ((i64)n * ranges + range) * a.capacity + to;
                Rect r = {box.box[0], box.box[1], box.box[2], box.box[3]};
                a.boxes[at] = r;
                a.inputs[at] = box.input;
                a.filled[at] = 1;
            }
            filled += total;
        }
    }
}

struct WriteArgs {
    // Of every slot of every picture.
    const Rect *boxes;
    const u32 *inputs;
    const int *label;
    const u8 *chosen; // by a sampler; none: all count that are a face's or background
    const u32 *starts;     // the number of each picture's first face
    const Weight *weights; // of every picture's choices, where there is a sampler
    const u32 *counts;     // [0]: slots matched
    // Zeros at first: of every picture how many slots are in each run, of every input how many.
    u32 *tally, *totals;
    // Of every row: image and corners; the anchor that the box is; the face's number, or what it is without one; weights.
    float *rows;
    AnchorBox *anchors;
    int *row_label;
    Weight *row_weight;
    u32 pictures, ranges, capacity, runs;
    int grouped;  // whether the sampler chose in each range by itself
    float weight; // of a picture's choices, or of all matched slots
};

const u32 NOWHERE = 0xffffffff;

// Which run of rows a slot is in, which has rows in the slots' order. Without a sampler a run is an input, and has its rows picture by
// picture; with one there is one input, and each picture has its runs: of each choice the positives, then the negatives.
DEVICE u32 run_of(const WriteArgs &a, i64 at, u32 slot)
{
    int label = a.label[at];
    if (!a.chosen)
        return label == IGNORED ? NOWHERE : a.inputs[at];
    return !a.chosen[at] ? NOWHERE : 2 * (a.grouped ? slot / a.capacity : 0) + (label < 0);
}

// Counts the slots of every run.
KERNEL(look_count, WriteArgs, 256)
{
    u32 slot = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y, slots = a.ranges * a.capacity;
    if (slot >= slots)
        return;
    u32 run = run_of(a, (i64)n * slots + slot, slot);
    if (run == NOWHERE)
        return;
    atomicAdd(&a.tally[n * a.runs + run], 1u);
    atomicAdd(&a.totals[a.chosen ? 0 : run], 1u);
}

// Row `row`, of a box that is `label`.
DEVICE void write_row(const WriteArgs &a, u32 row, u32 n, const Rect &b, int label, const Weight &weight)
{
    float *to = a.rows + 5 * (i64)row;
    to[0] = (float)n;
    to[1] = b.x1;
    to[2] = b.y1;
    to[3] = b.x2;
    to[4] = b.y2;
    // `Anchor::of`.
    AnchorBox p = {__fmul_rn(__fadd_rn(b.x1, b.x2), 0.5f), __fmul_rn(__fadd_rn(b.y1, b.y2), 0.5f), __fsub_rn(b.x2, b.x1), __fsub_rn(b.y2, b.y1)};
    a.anchors[row] = p;
    a.row_label[row] = label;
    a.row_weight[row] = weight;
}

// Writes the rows of a picture's run. A block each. An input without any gets one that counts for nothing (`Looks`).
KERNEL(look_write, WriteArgs, 1024)
{
    u32 *of_warps = (u32 *)shared_bytes();
    u32 run = blockIdx.x, n = blockIdx.y, input = a.chosen ? 0 : run, slots = a.ranges * a.capacity, row = 0;
    if (a.chosen) {
        for (u32 k = 0; k < n * a.runs + run; k++)
            row += a.tally[k];
    } else {
        for (u32 k = 0; k < input; k++)
            row += a.totals[k] ? a.totals[k] : 1;
        for (u32 k = 0; k < n; k++)
            row += a.tally[k * a.runs + run];
    }
    if (a.totals[input] == 0) {
        Rect pixel = {0.0f, 0.0f, 1.0f, 1.0f};
        Weight nothing = {0.0f, 0.0f};
        if (n == 0 && run == input && threadIdx.x == 0)
            write_row(a, row, 0, pixel, IGNORED, nothing);
        return;
    }
    u32 choice = a.chosen && a.grouped ? run / 2 : 0;
    Weight weight = {0.0f, 0.0f};
    if (a.chosen) {
        weight = a.weights[n * (a.grouped ? a.ranges : 1) + choice];
        weight.logit = __fmul_rn(weight.logit, a.weight);
        weight.box = __fmul_rn(weight.box, a.weight);
    } else {
        weight.logit = __fdiv_rn(a.weight, (float)(a.counts[0] ? a.counts[0] : 1));
    }
    // Where the run's slots can be.
    bool one_range = a.chosen && a.grouped;
    u32 begin = one_range ? choice * a.capacity : 0, end = one_range ? begin + a.capacity : slots;
    for (u32 first = begin; first < end; first += BLOCK) {
        u32 slot = first + threadIdx.x;
        i64 at = (i64)n * slots + slot;
        bool own = slot < end && run_of(a, at, slot) == run;
        u32 total, to = row + count_before(own, of_warps, &total);
        if (own) {
            int label = a.label[at];
            write_row(a, to, n, a.boxes[at], label < 0 ? label : (int)a.starts[n] + label, weight);
        }
        row += total;
    }
}
