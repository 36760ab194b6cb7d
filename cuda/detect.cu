// From a network's outputs to faces: candidates above a score are decoded and placed on the picture, the best of them kept, sorted and
// freed of those that overlap better ones. Definitions: `Detector::decode`, candidates.rs and nms.rs of src/detect.
//
// Candidates come in whatever order the atomics give. Nothing that is found depends on it: every step goes by the order of `words`
// below, in which no two are equal.
#include "common.cuh"
#include "suppress.cuh"

// Levels of a launch, and anchors of all of them.
const int MOST_LEVELS = 8, MOST_ANCHORS = 128;
// Values of a candidate beside box and score.
const int EXTRAS = 10;

// What may change from one detection to the next, in the device's memory: launches that were recorded stay as they are.
struct Settings {
    float least; // logit that a face must pass
    float iou;   // overlap that suppresses
    float extra; // that overlaps add to widths and heights: 1 where corners are pixels inclusively
    float min_px, max_px;
    u32 max_candidates, max_faces;
    u32 suppress; // 0: all candidates are wanted, sorted
};

// Sixteen words.
struct __align__(16) Candidate {
    float box[4]; // x1, y1, x2, y2, pixels of the upright picture
    float score;
    u32 order; // in which a CPU would have found it
    // Five points x, y; or template, offsets, logit, factors of x and y, whether mirrored.
    float extras[EXTRAS];
};

// Counters of a detection.
struct State {
    u32 held;     // candidates that were to be stored: may exceed the capacity
    u32 dropped;  // by faces_reduce, since better ones were enough
    u32 overflow; // for which there was no room
    u32 done;     // blocks of faces_finish that have sorted their share
};

// What is read first of the result; its candidates follow.
struct Header {
    u32 found;  // candidates above the score and of a size asked for
    u32 sorted; // of these the best that reached the suppression
    u32 kept;   // candidates that follow
    u32 overflow;
    u32 unused[12];
};

struct Buffers {
    const Settings *settings;
    State *state;
    u32 *keys; // `ascending` of every candidate's score: what is compared first lies together
    Candidate *candidates;
    u32 capacity;
    u32 limit; // of max_candidates
    u64 step;  // bytes from the state, keys and candidates of an image to the next one's
};

struct FacesArgs {
    Buffers buffers;
    Header *header;
    Candidate *result;
    u64 step; // bytes from the header and result of an image to the next one's
};

template <class T> DEVICE T *later(T *first, u64 bytes) { return (T *)((u8 *)first + bytes); }

// Those of the image that the block works on: every launch has one a row of blocks.
DEVICE Buffers of_image(const Buffers &first)
{
    Buffers own = first;
    u64 bytes = blockIdx.y * first.step;
    own.state = later(first.state, bytes);
    own.keys = later(first.keys, bytes);
    own.candidates = later(first.candidates, bytes);
    return own;
}

KERNEL(faces_begin, FacesArgs, 32)
{
    if (threadIdx.x < sizeof(State) / 4)
        ((u32 *)of_image(a.buffers).state)[threadIdx.x] = 0;
    if (threadIdx.x < sizeof(Header) / 4)
        ((u32 *)later(a.header, blockIdx.y * a.step))[threadIdx.x] = 0;
}

// Values of an output map: those of anchor i of a cell are at i * anchor, `value` apart. No data: there is no such map.
struct Values {
    const float *data; // the first value of the first anchor of the map's first cell
    int row, pixel, anchor, value;
    int image; // from an image's to the next one's
};

DEVICE const float *values_of(const Values &v, int y, int x, int anchor)
{
    return v.data + (i64)blockIdx.y * v.image + (y * v.row + x * v.pixel + anchor * v.anchor);
}

struct Anchor {
    int index; // in the maps
    float width, height;
};

struct Level {
    Values logits, boxes, filter, mover, landmarks;
    u32 first_block;
    int row, column; // the first own cell
    u32 columns, cells; // own ones: columns, and all
    u32 first_anchor, anchors;
    u32 order; // of its first candidate
    int pair;  // logits of background and face rather than one
    float stride, center; // pixels between cells, and of the first cell's centre
    float survives; // what the filter's logits must pass
    float variances[2];
    float reach;  // of a box from its cell's centre along an axis; 0: any
    int features; // extras are what an ellipse is computed from
};

struct DecodeArgs {
    Buffers buffers;
    float offset[2], factor[2]; // from the network's pixels to the picture's
    int mirrored;
    float width; // of the picture
    u32 levels;
    Level level[MOST_LEVELS];
    Anchor anchor[MOST_ANCHORS];
};

// Centre and size.
struct Placed {
    float x, y, w, h;
};

// The point that an offset means on an anchor, along an axis.
DEVICE float point(float center, float size, float t, float variance)
{
    return __fadd_rn(center, __fmul_rn(__fmul_rn(t, variance), size));
}

// The box that offsets mean on an anchor (`Anchor::decode`).
DEVICE Box decoded(const Placed &anchor, const float t[4], float center, float size)
{
    float x = point(anchor.x, anchor.w, t[0], center), y = point(anchor.y, anchor.h, t[1], center);
    float w = __fmul_rn(anchor.w, expf(__fmul_rn(t[2], size))) * 0.5f;
    float h = __fmul_rn(anchor.h, expf(__fmul_rn(t[3], size))) * 0.5f;
    Box b = {__fsub_rn(x, w), __fsub_rn(y, h), __fadd_rn(x, w), __fadd_rn(y, h)};
    return b;
}

DEVICE void offsets_of(const Values &v, int y, int x, int anchor, float t[4])
{
    const float *from = values_of(v, y, x, anchor);
#pragma unroll
    for (int i = 0; i < 4; i++)
        t[i] = from[i * v.value];
}

// One thread an anchor of a level's own cells, of one of the images.
KERNEL(faces_decode, DecodeArgs, 256)
{
    u32 which = 0;
    while (which + 1 < a.levels && blockIdx.x >= a.level[which + 1].first_block)
        which++;
    const Level &l = a.level[which];
    const Buffers buffers = of_image(a.buffers);
    const Settings &settings = *a.buffers.settings;
    u32 index = (blockIdx.x - l.first_block) * blockDim.x + threadIdx.x;
    u32 cell = index / l.anchors;
    const Anchor &shape = a.anchor[l.first_anchor + index % l.anchors];
    int y = l.row + (int)(cell / l.columns), x = l.column + (int)(cell % l.columns);

    float logit = 0.0f;
    bool found = cell < l.cells;
    if (found) {
        const float *from = values_of(l.logits, y, x, shape.index);
        logit = l.pair ? __fsub_rn(from[l.logits.value], from[0]) : from[0];
        // False for a NaN too.
        found = logit > settings.least;
        if (found && l.filter.data)
            found = *values_of(l.filter, y, x, shape.index) > l.survives;
    }
    if (!__any_sync(0xffffffffu, found))
        return;

    Box b = {0.0f, 0.0f, 0.0f, 0.0f};
    float t[4] = {0.0f, 0.0f, 0.0f, 0.0f}, points[EXTRAS] = {};
    if (found) {
        Placed anchor = {(float)x * l.stride + l.center, (float)y * l.stride + l.center, shape.width, shape.height};
        if (l.mover.data) {
            offsets_of(l.mover, y, x, shape.index, t);
            Box m = decoded(anchor, t, 1.0f, 1.0f);
            Placed moved = {(m.x1 + m.x2) * 0.5f, (m.y1 + m.y2) * 0.5f, __fsub_rn(m.x2, m.x1), __fsub_rn(m.y2, m.y1)};
            anchor = moved;
        }
        offsets_of(l.boxes, y, x, shape.index, t);
        b = decoded(anchor, t, l.variances[0], l.variances[1]);
        // What is no number stays one.
        if (l.reach > 0.0f && is_number(b.x2 - b.x1) && is_number(b.y2 - b.y1)) {
            b.x1 = fmaxf(b.x1, anchor.x - l.reach);
            b.y1 = fmaxf(b.y1, anchor.y - l.reach);
            b.x2 = fminf(b.x2, anchor.x + l.reach);
            b.y2 = fminf(b.y2, anchor.y + l.reach);
        }
        b.x1 = __fmul_rn(__fadd_rn(b.x1, a.offset[0]), a.factor[0]);
        b.y1 = __fmul_rn(__fadd_rn(b.y1, a.offset[1]), a.factor[1]);
        b.x2 = __fmul_rn(__fadd_rn(b.x2, a.offset[0]), a.factor[0]);
        b.y2 = __fmul_rn(__fadd_rn(b.y2, a.offset[1]), a.factor[1]);
        if (a.mirrored) {
            float left = __fsub_rn(a.width, b.x2);
            b.x2 = __fsub_rn(a.width, b.x1);
            b.x1 = left;
        }
        float w = __fsub_rn(b.x2, b.x1), h = __fsub_rn(b.y2, b.y1), side = fmaxf(w, h);
        found = is_number(b.x1) && is_number(b.y1) && is_number(w) && is_number(h) && w > 0.0f && h > 0.0f;
        found = found && side >= settings.min_px && (settings.max_px == 0.0f || side <= settings.max_px);
        if (l.landmarks.data) {
            const float *from = values_of(l.landmarks, y, x, shape.index);
#pragma unroll
            for (int i = 0; i < EXTRAS / 2; i++) {
                // Mirrored, left and right change places: eyes, nose, corners of the mouth.
                const int other[EXTRAS / 2] = {1, 0, 2, 4, 3};
                int source = a.mirrored ? other[i] : i;
                float px = point(anchor.x, anchor.w, from[2 * source * l.landmarks.value], l.variances[0]);
                float py = point(anchor.y, anchor.h, from[(2 * source + 1) * l.landmarks.value], l.variances[0]);
                px = __fmul_rn(__fadd_rn(px, a.offset[0]), a.factor[0]);
                points[2 * i] = a.mirrored ? __fsub_rn(a.width, px) : px;
                points[2 * i + 1] = __fmul_rn(__fadd_rn(py, a.offset[1]), a.factor[1]);
                found = found && is_number(points[2 * i]) && is_number(points[2 * i + 1]);
            }
        } else if (l.features) {
            const float features[EXTRAS] = {(float)shape.index, t[0],        t[1],        t[2],
                                            t[3],               logit,       a.factor[0], a.factor[1],
                                            (float)a.mirrored,  0.0f};
#pragma unroll
            for (int i = 0; i < EXTRAS; i++)
                points[i] = features[i];
        }
    }

    // One atomic a warp.
    u32 votes = __ballot_sync(0xffffffffu, found), lane = threadIdx.x % 32;
    if (!votes)
        return;
    u32 slot = 0;
    if (lane == 0)
        slot = atomicAdd(&buffers.state->held, (u32)__popc(votes));
    slot = __shfl_sync(0xffffffffu, slot, 0) + (u32)__popc(votes & ((1u << lane) - 1));
    if (!found || slot >= buffers.capacity)
        return;
    float score = 1.0f / (1.0f + expf(-logit));
    buffers.keys[slot] = ascending(score);
    Candidate &to = buffers.candidates[slot];
    to.box[0] = b.x1;
    to.box[1] = b.y1;
    to.box[2] = b.x2;
    to.box[3] = b.y2;
    to.score = score;
    to.order = l.order + index;
#pragma unroll
    for (int i = 0; i < EXTRAS; i++)
        to.extras[i] = points[i];
}

// What candidates are ordered by, the first word first, ascending: score downwards, then y1, x1, y2, x2 (which do not depend on how a
// picture was cut), then the order in which they were found.
const int WORDS = 6;

DEVICE u32 word_of(const Candidate &c, int word)
{
    switch (word) {
    case 0: return ~ascending(c.score);
    case 1: return ascending(c.box[1]);
    case 2: return ascending(c.box[0]);
    case 3: return ascending(c.box[3]);
    case 4: return ascending(c.box[2]);
    default: return c.order;
    }
}

// Whether `l` comes before `r`, whose scores are equal.
DEVICE bool is_before(const Candidate &l, const Candidate &r)
{
    for (int word = 1; word < WORDS; word++) {
        u32 of_l = word_of(l, word), of_r = word_of(r, word);
        if (of_l != of_r)
            return of_l < of_r;
    }
    return false;
}

struct ReduceShared {
    u32 bins[256];
    u32 of_warps[32];
    u32 cut[WORDS]; // words of the last one kept, as far as they had to be found
    u32 left;       // how many of those that agree with the cut are kept
    u32 whole;      // whether that is all of them
};

// Where more than max_candidates are held, the best so many stay, at the front. One block an image. A radix select: digit after digit of the
// words, how many candidates have which tells what the last one kept has.
KERNEL(faces_reduce, FacesArgs, 1024)
{
    const Buffers all = of_image(a.buffers);
    u32 held = all.state->held, most = all.settings->max_candidates;
    most = most < all.limit ? most : all.limit;
    if (held <= most)
        return;
    u32 n = held < all.capacity ? held : all.capacity, lane = threadIdx.x % 32;
    ReduceShared &s = *(ReduceShared *)shared_bytes();
    if (threadIdx.x < WORDS)
        s.cut[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        s.left = most;
        s.whole = most == 0 || n == most;
    }
    __syncthreads();
    int word = 0, shift = 32;
    while (!s.whole && word < WORDS) {
        shift -= 8;
        if (threadIdx.x < 256)
            s.bins[threadIdx.x] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < n; i += BLOCK) {
            const Candidate &c = all.candidates[i];
            bool agrees = true;
            for (int w = 0; w < word; w++)
                agrees = agrees && word_of(c, w) == s.cut[w];
            if (!agrees)
                continue;
            u32 value = word ? word_of(c, word) : ~all.keys[i];
            // In two shifts: one by 32 bits is undefined.
            if ((value ^ s.cut[word]) >> shift >> 8 == 0)
                atomicAdd(&s.bins[value >> shift & 255], 1u);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            u32 own = 0, left = s.left;
            for (u32 i = 0; i < 8; i++)
                own += s.bins[lane * 8 + i];
            u32 through = sums_through(own), before = through - own;
            if (before < left && left <= through) {
                u32 digit = lane * 8;
                while (before + s.bins[digit] < left)
                    before += s.bins[digit++];
                s.cut[word] |= digit << shift;
                s.left = left - before;
                s.whole = s.bins[digit] == left - before;
            }
        }
        __syncthreads();
        if (shift == 0 && !s.whole) {
            word++;
            shift = 32;
        }
    }
    // What comes before the cut, and what agrees with it.
    u32 kept = 0;
    for (u32 first = 0; first < n; first += BLOCK) {
        u32 i = first + threadIdx.x;
        bool keep = i < n && most > 0;
        if (keep && n > most) {
            const Candidate &c = all.candidates[i];
            for (int w = 0; w <= word && w < WORDS; w++) {
                int down = w == word ? shift : 0;
                u32 value = word_of(c, w) >> down, cut = s.cut[w] >> down;
                if (value != cut) {
                    keep = value < cut;
                    break;
                }
            }
        }
        u32 key = keep ? all.keys[i] : 0;
        u32 total, at = kept + count_before(keep, s.of_warps, &total);
        move(all.candidates, keep, i, at);
        if (keep)
            all.keys[at] = key;
        kept += total;
    }
    if (threadIdx.x == 0) {
        all.state->held = kept;
        all.state->dropped += n - kept;
        all.state->overflow += held - n;
    }
}

struct FinishShared {
    SuppressShared suppress;
    u32 last;
};

// Candidates that a warp ranks at once.
const u32 RANKED = 4;

// Sorts, suppresses, and says how many there are. A warp finds the ranks of some candidates by comparing them with all, and puts them
// there; the image's block that is done last goes on alone.
KERNEL(faces_finish, FacesArgs, 1024)
{
    const Buffers all = of_image(a.buffers);
    Header &header = *later(a.header, blockIdx.y * a.step);
    Candidate *result = later(a.result, blockIdx.y * a.step);
    const Settings &settings = *all.settings;
    u32 held = all.state->held, lane = threadIdx.x % 32;
    u32 n = held < all.capacity ? held : all.capacity;
    u32 most = settings.max_candidates < all.limit ? settings.max_candidates : all.limit;
    // Few candidates are spread over all blocks.
    u32 warp = threadIdx.x / 32 * gridDim.x + blockIdx.x, warps = gridDim.x * (BLOCK / 32);
    for (u32 i = warp * RANKED; i < n; i += warps * RANKED) {
        u32 own[RANKED], better[RANKED];
#pragma unroll
        for (u32 k = 0; k < RANKED; k++) {
            // Behind the last: a key that no score has.
            own[k] = i + k < n ? all.keys[i + k] : 0xffffffff;
            better[k] = 0;
        }
        for (u32 j = lane; j < n; j += 32) {
            u32 other = all.keys[j];
#pragma unroll
            for (u32 k = 0; k < RANKED; k++) {
                better[k] += other > own[k];
                if (other == own[k] && j != i + k)
                    better[k] += is_before(all.candidates[j], all.candidates[i + k]);
            }
        }
#pragma unroll
        for (u32 k = 0; k < RANKED; k++) {
            u32 rank = __shfl_sync(0xffffffffu, sums_through(better[k]), 31);
            if (i + k < n && rank < most && lane < sizeof(Candidate) / 4)
                ((u32 *)(result + rank))[lane] = ((const u32 *)(all.candidates + i + k))[lane];
        }
    }

    FinishShared &s = *(FinishShared *)shared_bytes();
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        s.last = atomicAdd(&all.state->done, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!s.last)
        return;
    u32 sorted = n < most ? n : most;
    if (threadIdx.x == 0) {
        header.found = held + all.state->dropped + all.state->overflow;
        header.sorted = sorted;
        header.overflow = all.state->overflow + held - n;
    }
    u32 kept = settings.suppress ? suppress(result, sorted, settings.iou, settings.extra, settings.max_faces, s.suppress) : sorted;
    if (threadIdx.x == 0)
        header.kept = kept;
}
