// Losses of the anchors, and the gradients of the outputs: src/train/losses and `Objective` of src/train/objective, an anchor a thread.
//
// A loss is f32 as on the CPU; sums are f64, over a block's threads first, then over blocks, in one order always.
#include "common.cuh"

// Of a background anchor whose decoded box overlaps a face so much some losses learn nothing.
const float IGNORED_OVERLAP = 0.5f;
// Classification losses.
const int SOFTMAX = 0, FOCAL = 2, QUALITY_FOCAL = 3, REGRESSION_AWARE_FOCAL = 4;
// Box losses, and what those of the IoU do where boxes do not overlap.
const int SMOOTH_L1 = 0, NEG_LN_IOU = 1;
// As MAX_SHIFT, MAX_LOG_SCALE, IOU_FLOOR of src/train/losses/boxes.rs and MIN_FACE_SIDE.
const float MAX_SHIFT = 1e4f, MAX_LOG_SCALE = 10.0f, IOU_FLOOR = 1e-6f, MIN_FACE_SIDE = 1.0f;
// Sums of a batch: classification, boxes, IoU of the positives, anchors matched, anchors mined.
const int SUMS = 5;

struct LossArgs {
    Anchors anchors;
    const Face *faces;
    const u32 *starts;
    const float *values; // the outputs
    float *gradient;     // as the outputs lie, zeros at first
    const int *label, *mined;
    const float *overlap;
    // What a sampler chose, and the weights of its choices; none: every anchor counts.
    const u8 *chosen;
    const Weight *weights;
    const Weight *own; // of every anchor, where each has weights of its own; none: those of its choice or of all
    const u32 *counts; // as MatchArgs and MineArgs have them
    double *partial;   // [pictures][blocks][SUMS]
    float variances[2];
    float share;       // of a picture, where a sampler chose
    float alpha, gamma; // of focal losses; gamma is the quality focal loss's beta
    float margin, beta, box_weight;
    float weight; // of these outputs among others
    int class_loss, box_loss, no_overlap, grouped;
};

// What sigmoid losses need of a logit: p, 1 - p, and the negative logarithms of both.
struct Logistic {
    float p, q, minus_ln_p, minus_ln_q;
};

DEVICE Logistic logistic(float x)
{
    // e^-|x| never overflows.
    bool positive = x >= 0.0f;
    float e = expf(positive ? -x : x), large = 1.0f / (1.0f + e), small = e / (1.0f + e), l = log1pf(e);
    Logistic s;
    s.p = positive ? large : small;
    s.q = positive ? small : large;
    s.minus_ln_p = positive ? l : l - x;
    s.minus_ln_q = positive ? x + l : l;
    return s;
}

// A loss and its derivative.
struct Slope {
    float loss, slope;
};

// -alpha_t (1 - p_t)^gamma ln p_t (Lin et al. 2017, Eq. 5).
DEVICE Slope focal_loss(float x, bool face, float alpha, float gamma)
{
    Logistic s = logistic(face ? x : -x);
    float factor = (face ? alpha : 1.0f - alpha) * expf(-(gamma * s.minus_ln_q));
    float slope = -(factor * (gamma * s.p * s.minus_ln_p + s.q));
    Slope r = {factor * s.minus_ln_p, face ? slope : -slope};
    return r;
}

// |y - p|^beta * -((1 - y) ln(1 - p) + y ln p) (Li et al. 2020, Eq. 2).
DEVICE Slope quality_focal_loss(float x, float quality, float beta)
{
    Logistic s = logistic(x);
    float entropy = (1.0f - quality) * s.minus_ln_q + quality * s.minus_ln_p;
    float off = (1.0f - quality) * s.p - quality * s.q, size = fabsf(off);
    Slope r = {0.0f, 0.0f};
    // A NaN passes, and shows in the sum.
    if (size <= 0.0f)
        return r;
    float factor = expf(beta * logf(size));
    r.loss = factor * entropy;
    r.slope = factor * (beta * s.p * s.q * entropy / off + off);
    return r;
}

DEVICE Slope cross_entropy(float x, bool face)
{
    Logistic s = logistic(x);
    Slope r = {face ? s.minus_ln_p : s.minus_ln_q, face ? -s.q : s.p};
    return r;
}

// A box loss, its derivative with respect to the offsets, and the IoU of the decoded box with its face.
struct BoxLoss {
    float loss, iou, gradient[4];
};

DEVICE Slope smooth_l1(float d, float beta)
{
    float size = fabsf(d);
    Slope r = {0.0f, 0.0f};
    if (size < beta) {
        r.loss = 0.5f * d * d / beta;
        r.slope = d / beta;
    } else if (d != 0.0f) {
        r.loss = size - 0.5f * beta;
        r.slope = d < 0.0f ? -1.0f : 1.0f;
    }
    return r;
}

// Within -limit to limit; NaN stays, and shows in the loss.
DEVICE float within(float v, float limit) { return v > limit ? limit : v < -limit ? -limit : v; }

// The offsets that mean `face` on an anchor, along an axis (Group Sampling Eq. 13): of the centre and of the size.
DEVICE void encode_axis(float low, float high, float center, float size, const float variances[2], float *of_center, float *of_size)
{
    float side = high - low;
    *of_center = ((low + high) * 0.5f - center) / size / variances[0];
    *of_size = logf((side < 1e-3f ? 1e-3f : side) / size) / variances[1];
}

// Any of the box losses; equations of Group Sampling, as src/train/losses/boxes.rs has them.
DEVICE BoxLoss box_loss(const LossArgs &a, const float t[4], const AnchorBox &anchor, const Rect &face)
{
    float center[2] = {anchor.x, anchor.y}, sides[2] = {anchor.w, anchor.h};
    float low[2] = {face.x1, face.y1}, high[2] = {face.x2, face.y2};
    float goal[4], size[2], p[4], corner[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < 2; k++) {
        encode_axis(low[k], high[k], center[k], sides[k], a.variances, &goal[k], &goal[2 + k]);
        // The decoded box, cut; corners rounded on their own, since equal edges are told from others.
        float middle = __fadd_rn(center[k], __fmul_rn(within(t[k] * a.variances[0], MAX_SHIFT), sides[k]));
        size[k] = sides[k] * expf(within(t[2 + k] * a.variances[1], MAX_LOG_SCALE));
        p[k] = __fsub_rn(middle, 0.5f * size[k]);
        p[2 + k] = __fadd_rn(middle, 0.5f * size[k]);
    }
    BoxLoss r = {0.0f, 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
    // Eq. 8 to 12. Where an edge of p lies on the face's, p's counts as the inner one.
    float w = (p[2] <= high[0] ? p[2] : high[0]) - (p[0] >= low[0] ? p[0] : low[0]);
    float h = (p[3] <= high[1] ? p[3] : high[1]) - (p[1] >= low[1] ? p[1] : low[1]);
    if (!(w <= 0.0f || h <= 0.0f)) {
        float wp = p[2] - p[0], hp = p[3] - p[1], shared = w * h;
        float all = wp * hp + (high[0] - low[0]) * (high[1] - low[1]) - shared, iou = shared / all;
        r.iou = iou;
        auto outward = [&](float side, float cut, bool inner) {
            cut = inner ? cut : 0.0f;
            return (cut - iou * (side - cut)) / all;
        };
        corner[0] = -outward(hp, h, p[0] >= low[0]);
        corner[1] = -outward(wp, w, p[1] >= low[1]);
        corner[2] = outward(hp, h, p[2] <= high[0]);
        corner[3] = outward(wp, w, p[3] <= high[1]);
    }
    if (a.box_loss == SMOOTH_L1) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            Slope s = smooth_l1(t[k] - goal[k], a.beta);
            r.loss += s.loss;
            r.gradient[k] = s.slope;
        }
        return r;
    }
    float slope;
    if (a.box_loss == NEG_LN_IOU) { // Eq. 7
        bool floor = r.iou <= IOU_FLOOR;
        r.loss = -logf(floor ? IOU_FLOOR : r.iou);
        slope = floor ? 0.0f : -1.0f / r.iou;
    } else { // Eq. 5, 6
        r.loss = (1.0f - r.iou) * (1.0f - r.iou);
        slope = -2.0f * (1.0f - r.iou);
    }
    if (r.iou <= 0.0f) {
        if (a.no_overlap)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float variance = a.variances[k / 2];
                Slope s = smooth_l1((t[k] - goal[k]) * variance, 1.0f);
                r.loss += s.loss;
                r.gradient[k] = s.slope * variance;
            }
        return r;
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        r.gradient[k] = slope * (corner[k] + corner[2 + k]) * a.variances[0] * sides[k];
        r.gradient[2 + k] = slope * 0.5f * (corner[2 + k] - corner[k]) * a.variances[1] * size[k];
    }
    return r;
}

DEVICE float share_of(u32 count) { return __fdiv_rn(1.0f, (float)(count > 0 ? count : 1)); }

// What an anchor adds to the sums; its gradients are written.
DEVICE void judge(const LossArgs &a, u32 n, u32 i, double sums[SUMS])
{
    i64 at = (i64)n * a.anchors.count + i;
    if (a.chosen && !a.chosen[at])
        return;
    u32 group = group_of(a.anchors, i);
    const AnchorGroup &g = a.anchors.groups[group];
    if (!g.parts)
        return;
    u32 cell = i - g.first;
    i64 first = g.logits + n * g.logit_picture + (i64)cell * g.logit_cell;
    int label = a.label[at], found = a.mined[at];
    bool matched = label >= 0 && found < 0;
    float overlap = a.overlap[at];
    int number = found >= 0 ? found : label;
    if (number == IGNORED)
        return;
    bool face = number >= 0;
    Rect box = {0.0f, 0.0f, 0.0f, 0.0f};
    bool logits = g.parts & HAS_LOGITS, boxes = g.parts & HAS_BOXES;
    float x = logits ? a.values[first] : 0.0f, other = 0.0f;
    if (a.class_loss == SOFTMAX) {
        other = x;
        x = a.values[first + 1];
    }
    if (face) {
        box = a.faces[a.starts[n] + (u32)number].box;
        // RefineFace Eq. 3 and 4.
        float side = sqrtf((box.x2 - box.x1) * (box.y2 - box.y1));
        x -= a.margin / (side > MIN_FACE_SIDE ? side : MIN_FACE_SIDE);
    }
    float t[4];
    AnchorBox anchor = anchor_of(a.anchors, g, n, i);
    if (face && boxes)
        offsets_on(a.values, g, n, cell, t);
    // Weights of the classification loss and of the box loss.
    float of_class, of_box;
    if (a.own) {
        of_class = a.own[at].logit;
        of_box = a.own[at].box;
    } else if (a.chosen) {
        Weight w = a.weights[a.grouped ? n * a.anchors.group_count + group : n];
        of_class = w.logit * a.share;
        of_box = w.box * a.share;
    } else {
        // Of a step that has both, the anchors matched and those mined.
        of_class = of_box = share_of((logits ? a.counts[0] : 0) + (boxes ? a.counts[1] : 0));
    }
    Slope s;
    if (a.class_loss == REGRESSION_AWARE_FOCAL) {
        // HAMBox Eq. 1 and 2.
        of_class = of_box = share_of(a.counts[face && !matched ? 1 : 0]);
        if (face && !matched)
            of_class *= overlap;
        else if (!face && overlap >= IGNORED_OVERLAP)
            return;
        s = focal_loss(x, face, a.alpha, a.gamma);
    } else if (a.class_loss == QUALITY_FOCAL) {
        float quality = 0.0f;
        if (matched)
            quality = rect_iou(decode_on(anchor, t, a.variances[0], a.variances[1]), box);
        else if (face)
            quality = overlap;
        else if (overlap >= IGNORED_OVERLAP)
            return;
        s = quality_focal_loss(x, quality, a.gamma);
    } else if (a.class_loss == FOCAL) {
        s = focal_loss(x, face, a.alpha, a.gamma);
    } else {
        s = cross_entropy(x - other, face);
    }
    if (logits) {
        sums[0] += (double)(s.loss * of_class);
        float slope = s.slope * of_class * a.weight;
        if (a.class_loss == SOFTMAX) {
            a.gradient[first] = -slope;
            a.gradient[first + 1] = slope;
        } else {
            a.gradient[first] = slope;
        }
    }
    if (!face || !boxes)
        return;
    sums[3] += matched ? 1.0 : 0.0;
    sums[4] += matched ? 0.0 : 1.0;
    BoxLoss b = box_loss(a, t, anchor, box);
    sums[1] += (double)(b.loss * of_box);
    sums[2] += (double)b.iou;
    float *to = a.gradient + g.boxes + n * g.box_picture + (i64)cell * g.box_cell;
#pragma unroll
    for (int k = 0; k < 4; k++)
        to[k * g.box_step] = b.gradient[k] * of_box * a.box_weight * a.weight;
}

// The sums over a block's 256 threads, in its first.
DEVICE void sum_block(double *shared, const double sums[SUMS])
{
    for (int k = 0; k < SUMS; k++)
        shared[k * 256 + threadIdx.x] = sums[k];
    __syncthreads();
    for (u32 half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half)
            for (int k = 0; k < SUMS; k++)
                shared[k * 256 + threadIdx.x] += shared[k * 256 + threadIdx.x + half];
        __syncthreads();
    }
}

KERNEL(anchor_losses, LossArgs, 256)
{
    double sums[SUMS] = {0.0, 0.0, 0.0, 0.0, 0.0}, *shared = (double *)shared_bytes();
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.anchors.count)
        judge(a, blockIdx.y, i, sums);
    sum_block(shared, sums);
    if (threadIdx.x < SUMS)
        a.partial[((i64)blockIdx.y * gridDim.x + blockIdx.x) * SUMS + threadIdx.x] = shared[threadIdx.x * 256];
}

struct TotalArgs {
    const double *partial;
    double *total; // [SUMS]
    u32 blocks;
};

// The sums over all blocks; one block.
KERNEL(total_losses, TotalArgs, 256)
{
    double sums[SUMS] = {0.0, 0.0, 0.0, 0.0, 0.0}, *shared = (double *)shared_bytes();
    for (u32 b = threadIdx.x; b < a.blocks; b += 256)
        for (int k = 0; k < SUMS; k++)
            sums[k] += a.partial[(i64)b * SUMS + k];
    sum_block(shared, sums);
    if (threadIdx.x < SUMS)
        a.total[threadIdx.x] = shared[threadIdx.x * 256];
}
