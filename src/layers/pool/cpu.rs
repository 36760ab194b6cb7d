//! Lowering of pooling.

use super::MaxPool;
use crate::cpu::program::Kind;
use crate::cpu::simple::PoolOp;
use crate::cpu::Op;

/// Max pooling.
pub(crate) fn lower_max(pool: &MaxPool) -> Op {
    let [top, left, ..] = pool.padding;
    Op(Kind::MaxPool(PoolOp { kernel: pool.kernel, stride: pool.stride, pad: [top, left] }))
}

/// Global average pooling.
pub(crate) fn lower_global_avg() -> Op {
    Op(Kind::GlobalAvgPool)
}
