// Which anchor learns which face: src/train/matching, by the same comparisons. There, cells that a face cannot reach are left out; here
// every anchor is compared with every face of its picture, which decides the same.
//
// Integers alone are added up or compared by atomics, so that the order of threads does not show.
#include "common.cuh"

// As `IGNORE_COVER`: share of an anchor's area in an ignored face.
const float IGNORE_COVER = 0.5f;
// A face without an anchor gets all of those between the thresholds that are its own.
const int SECOND_ALL = 1;

struct MatchArgs {
    Anchors anchors;
    const Face *faces;   // picture by picture
    const u32 *starts;   // the first face of each picture, and the end
    const Rect *inside;  // what each picture fills; none: anchors may lie anywhere
    const u8 *seen;      // whether a first step left each anchor to this one; none: it left all
    const Rect *boxes;   // what is matched in the anchors' places; none: they themselves
    // Of every anchor of every picture: the face's number in its picture or what it is without one; the face between the thresholds, and
    // behind the last step that of the mining, -1 for none; the IoU, behind the last step 0.
    int *label, *best;
    float *overlap;
    // Of every face, zeros at first: whether it has an anchor; how many; what it claims beside.
    u32 *hit, *held;
    u64 *claims;
    u32 *counts; // anchors matched: [0] of groups that have logits, [1] of those that have boxes alone
    u32 face_count;
    float low, high;
    int second;
};

// What is matched as anchor `i` of picture `n`.
DEVICE Rect box_of(const MatchArgs &a, const AnchorGroup &g, u32 n, u32 i)
{
    return a.boxes ? a.boxes[(i64)n * a.anchors.count + i] : corners(anchor_of(a.anchors, g, n, i));
}

// Where the faces end that an anchor is compared with: it is with none where it may be anywhere and is empty or no number (`match_boxes`).
DEVICE u32 end_of(const MatchArgs &a, u32 n, const Rect &box)
{
    bool anywhere = a.anchors.moved || a.boxes;
    return a.starts[anywhere && is_empty(box) ? n : n + 1];
}

// The first pass: an anchor's best face, the first of equal ones.
KERNEL(match_anchors, MatchArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (i >= a.anchors.count)
        return;
    const AnchorGroup &g = a.anchors.groups[group_of(a.anchors, i)];
    Rect box = box_of(a, g, n, i);
    float most = 0.0f;
    int best = -1;
    u32 start = a.starts[n], end = end_of(a, n, box);
    for (u32 j = start; j < end; j++) {
        if (a.faces[j].flags != FACE_WHOLE)
            continue;
        float v = rect_iou(box, a.faces[j].box);
        if (v >= a.low && v > most) {
            most = v;
            best = (int)(j - start);
        }
    }
    i64 at = (i64)n * a.anchors.count + i;
    bool found = most >= a.high;
    if (found)
        atomicOr(&a.hit[start + (u32)best], 1u);
    a.label[at] = found ? best : best < 0 ? BACKGROUND : IGNORED;
    a.best[at] = best;
    a.overlap[at] = most;
}

// A face without an anchor claims the best of those between the thresholds that are its own, the first of equal ones.
KERNEL(match_second, MatchArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (i >= a.anchors.count)
        return;
    i64 at = (i64)n * a.anchors.count + i;
    if (a.label[at] != IGNORED)
        return;
    u32 face = a.starts[n] + (u32)a.best[at];
    if (!a.hit[face])
        atomicMax(&a.claims[face], key_of(a.overlap[at], i));
}

// The cell whose centre is nearest on an axis.
DEVICE u32 nearest_cell(float low, float high, float stride, u32 cells)
{
    double v = ((double)low + (double)high) / 2.0 / (double)stride;
    // False for a NaN too, which is on the first cell.
    if (!(v > 0.0))
        return 0;
    return v < (double)cells ? (u32)v : cells - 1;
}

// A face without an anchor claims the one that overlaps it most.
KERNEL(match_force, MatchArgs, 256)
{
    u32 j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= a.face_count || a.hit[j] || a.faces[j].flags & FACE_IGNORED)
        return;
    Rect face = a.faces[j].box;
    float most = 0.0f;
    u32 best = 0;
    for (u32 k = 0; k < a.anchors.group_count; k++) {
        const AnchorGroup &g = a.anchors.groups[k];
        if (g.cells == 0)
            continue;
        u32 rows = g.cells / g.columns;
        u32 y = nearest_cell(face.y1, face.y2, g.stride, rows), x = nearest_cell(face.x1, face.x2, g.stride, g.columns);
        u32 cell = y * g.columns + x;
        float v = rect_iou(corners(anchor_on(g, cell)), face);
        if (v > most) {
            most = v;
            best = g.first + cell;
        }
    }
    if (most > 0.0f)
        a.claims[j] = key_of(most, best);
}

// As match_force, where anchors may lie anywhere: of all of them, of equal ones the first.
KERNEL(match_force_moved, MatchArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (i >= a.anchors.count)
        return;
    i64 at = (i64)n * a.anchors.count + i;
    Rect box = a.boxes ? a.boxes[at] : corners(a.anchors.moved[at]);
    u32 end = end_of(a, n, box);
    for (u32 j = a.starts[n]; j < end; j++) {
        if (a.hit[j] || a.faces[j].flags & FACE_IGNORED)
            continue;
        float v = rect_iou(box, a.faces[j].box);
        if (v > 0.0f)
            atomicMax(&a.claims[j], key_of(v, i));
    }
}

// Gives faces what they claim and nobody has; of two that claim one anchor the one with the higher IoU gets it, of equal ones the first.
KERNEL(match_take, MatchArgs, 256)
{
    u32 j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= a.face_count)
        return;
    u64 own = a.claims[j];
    if (own == 0)
        return;
    u32 n = a.faces[j].picture, start = a.starts[n], end = a.starts[n + 1];
    for (u32 k = start; k < end; k++) {
        u64 other = a.claims[k];
        if (other != 0 && (u32)other == (u32)own && (other > own || (other == own && k < j)))
            return;
    }
    i64 at = (i64)n * a.anchors.count + number_of(own);
    if (a.label[at] >= 0)
        return;
    a.label[at] = (int)(j - start);
    a.overlap[at] = iou_of(own);
}

// Ignored faces, anchors that cross the picture's border or that a first step dropped, and counts.
KERNEL(match_finish, MatchArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (i >= a.anchors.count)
        return;
    const AnchorGroup &g = a.anchors.groups[group_of(a.anchors, i)];
    Rect box = box_of(a, g, n, i);
    i64 at = (i64)n * a.anchors.count + i;
    u32 start = a.starts[n], end = end_of(a, n, box);
    int label = a.label[at];
    if (a.second == SECOND_ALL && label == IGNORED && !a.hit[start + (u32)a.best[at]])
        label = a.best[at];
    float own = a.overlap[at];
    for (u32 j = start; j < end && label != IGNORED; j++) {
        if (a.faces[j].flags != (FACE_WHOLE | FACE_IGNORED))
            continue;
        Rect face = a.faces[j].box;
        float v = rect_iou(box, face);
        bool covered = __fdiv_rn(rect_shared(box, face), rect_area(box)) >= IGNORE_COVER;
        if (label == BACKGROUND ? v >= a.low || covered : v >= a.low && v > own)
            label = IGNORED;
    }
    if (a.inside) {
        Rect b = a.inside[n];
        if (box.x1 < b.x1 || box.y1 < b.y1 || box.x2 > b.x2 || box.y2 > b.y2)
            label = IGNORED;
    }
    if (a.seen && !a.seen[at])
        label = IGNORED;
    if (label >= 0) {
        atomicAdd(&a.held[start + (u32)label], 1u);
        if (g.parts)
            atomicAdd(&a.counts[g.parts & HAS_LOGITS ? 0 : 1], 1u);
    }
    a.label[at] = label;
    a.best[at] = -1;
    a.overlap[at] = 0.0f;
}

struct MoveArgs {
    Anchors anchors; // as the first step has them
    const float *values;
    AnchorBox *moved; // none: no group has boxes
    u8 *seen;
    float survives; // least logit, not counted
};

// What a first step leaves to the second: it moves the anchors that it has boxes of (RefineFace, section 3.1), and drops easy background
// where it has logits.
KERNEL(move_anchors, MoveArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (i >= a.anchors.count)
        return;
    const AnchorGroup &g = a.anchors.groups[group_of(a.anchors, i)];
    u32 cell = i - g.first;
    i64 at = (i64)n * a.anchors.count + i;
    a.seen[at] = passes_on(a.values, g, n, cell, a.survives);
    if (a.moved)
        a.moved[at] = g.parts & HAS_BOXES ? moved_on(a.values, g, n, cell) : anchor_on(g, cell);
}

struct MineArgs {
    Anchors anchors;
    const Face *faces;
    const u32 *starts;
    const float *values; // the outputs
    const int *label;
    // As MatchArgs has them behind its last step. `overlap` becomes the best IoU of the decoded box with any face, of a mined
    // anchor that with its own; 0 where that is below the floor.
    int *mined;
    float *overlap;
    const u32 *held;
    u32 *found;  // of every face, zeros at first: whether any anchor can be mined for it
    u32 *listed; // of every picture, zero at first: anchors that can be mined
    u32 *list;   // their numbers, in any order; the highest bit: it was
    Rect *boxes; // and decoded boxes
    u32 *counts; // [1]: anchors mined are added
    float variances[2];
    float least, floor; // IoU of a mined anchor, and of any that counts
    u32 anchors_a_face;
};

const u32 TAKEN = 0x80000000;

// What every anchor's decoded box finds.
KERNEL(mine_find, MineArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (i >= a.anchors.count)
        return;
    const AnchorGroup &g = a.anchors.groups[group_of(a.anchors, i)];
    float t[4];
    offsets_on(a.values, g, n, i - g.first, t);
    Rect box = decode_on(anchor_of(a.anchors, g, n, i), t, a.variances[0], a.variances[1]);
    if (!is_number(box))
        return;
    i64 at = (i64)n * a.anchors.count + i;
    bool background = a.label[at] == BACKGROUND, wanted = false;
    float best = 0.0f;
    u32 end = a.starts[n + 1];
    for (u32 j = a.starts[n]; j < end; j++) {
        u32 flags = a.faces[j].flags;
        if (!(flags & FACE_WHOLE))
            continue;
        float v = rect_iou(box, a.faces[j].box);
        if (v >= a.floor && v > best)
            best = v;
        if (v >= a.least && background && !(flags & FACE_IGNORED) && a.held[j] < a.anchors_a_face) {
            wanted = true;
            atomicOr(&a.found[j], 1u);
        }
    }
    a.overlap[at] = best;
    if (wanted) {
        i64 to = (i64)n * a.anchors.count + atomicAdd(&a.listed[n], 1u);
        a.list[to] = i;
        a.boxes[to] = box;
    }
}

// The highest of a block's 256 values, in all of its threads.
DEVICE u64 highest(u64 *shared, u64 own)
{
    shared[threadIdx.x] = own;
    __syncthreads();
    for (u32 half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half && shared[threadIdx.x + half] > shared[threadIdx.x])
            shared[threadIdx.x] = shared[threadIdx.x + half];
        __syncthreads();
    }
    u64 most = shared[0];
    __syncthreads();
    return most;
}

// Faces choose in their order, the best first, of equal ones the first anchor. A block a picture; a thread has every 256th of the
// picture's list, so that nobody else sees what it marks.
KERNEL(mine_take, MineArgs, 256)
{
    u64 *shared = (u64 *)shared_bytes();
    u32 n = blockIdx.x, start = a.starts[n], end = a.starts[n + 1], listed = a.listed[n];
    u32 *list = a.list + (i64)n * a.anchors.count;
    const Rect *boxes = a.boxes + (i64)n * a.anchors.count;
    u32 mined = 0;
    for (u32 j = start; j < end; j++) {
        if (!a.found[j])
            continue;
        Rect face = a.faces[j].box;
        for (u32 room = a.anchors_a_face - a.held[j]; room > 0; room--) {
            u64 own = 0;
            u32 place = 0;
            for (u32 k = threadIdx.x; k < listed; k += 256) {
                if (list[k] & TAKEN)
                    continue;
                float v = rect_iou(boxes[k], face);
                u64 key = v >= a.least ? key_of(v, list[k]) : 0;
                if (key > own) {
                    own = key;
                    place = k;
                }
            }
            u64 most = highest(shared, own);
            if (most == 0)
                break;
            if (own == most) {
                i64 at = (i64)n * a.anchors.count + list[place];
                a.mined[at] = (int)(j - start);
                a.overlap[at] = iou_of(most);
                list[place] |= TAKEN;
            }
            mined++;
        }
    }
    if (threadIdx.x == 0 && mined > 0)
        atomicAdd(&a.counts[1], mined);
}
