//! NVIDIA libraries: which of them this machine has. The backend itself is not written yet; a session that
//! requires CUDA is refused with the first thing that is missing.

pub mod probe;
