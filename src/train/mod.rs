//! Training: the very layers that the library runs, walked forward and backward.

pub mod network;
mod units;
