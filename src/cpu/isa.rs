//! Which instruction set the kernels use, decided once at run time.

use std::sync::OnceLock;

/// Instruction sets that kernels exist for, weakest first. An `Isa` other than [`Isa::Generic`] is
/// only handed out by [`detected`] and [`Isa::supported`] (no other crate can write one down), so holding one is
/// proof that this CPU runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Portable Rust, whatever the compiler makes of it.
    Generic,
    /// AArch64 Advanced SIMD.
    #[cfg(target_arch = "aarch64")]
    #[non_exhaustive]
    Neon,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    #[non_exhaustive]
    Avx2,
    /// AVX-512 F, BW and VL (every CPU with AVX-512 but the Xeon Phi).
    #[cfg(target_arch = "x86_64")]
    #[non_exhaustive]
    Avx512,
    /// AVX-512 with BF16 and VNNI, and AMX tiles of bf16 and int8 that the operating system lets this process use.
    #[cfg(target_arch = "x86_64")]
    #[non_exhaustive]
    Amx,
}

impl Isa {
    /// Every ISA that this CPU can run, weakest first; tests run all of them. Asks the operating system for AMX where the CPU has
    /// it.
    pub fn supported() -> Vec<Isa> {
        #[allow(unused_mut)] // where no other kernels exist
        let mut isas = Self::unasked();
        #[cfg(target_arch = "x86_64")]
        if isas.contains(&Isa::Avx512)
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512vnni")
            && super::tiles::permitted()
        {
            isas.push(Isa::Amx);
        }
        isas
    }

    /// Those for which nobody must be asked.
    fn unasked() -> Vec<Isa> {
        #[allow(unused_mut)] // where no other kernels exist
        let mut isas = vec![Isa::Generic];
        #[cfg(target_arch = "aarch64")]
        isas.push(Isa::Neon); // part of the base architecture
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                isas.push(Isa::Avx2);
                let avx512 = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl");
                if avx512 {
                    isas.push(Isa::Avx512);
                }
            }
        }
        isas
    }

    /// Whether the CPU has a dot product of bf16.
    pub(crate) fn multiplies_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self >= Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Whether the CPU multiplies and adds f16, at twice the rate of f32.
    pub(crate) fn multiplies_f16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self >= Isa::Avx512 && is_x86_feature_detected!("avx512fp16");
        #[cfg(target_arch = "aarch64")]
        return self == Isa::Neon && std::arch::is_aarch64_feature_detected!("fp16");
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        false
    }

    /// Whether eight bits are taken to be faster than f32: on x86 not by plain loops, nor by AVX2's pairs where AVX-512 multiplies
    /// f32; elsewhere always.
    pub(crate) fn gains_by_u8(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return match self {
            Isa::Amx => true,
            Isa::Avx512 => is_x86_feature_detected!("avx512vnni"),
            Isa::Avx2 => true,
            Isa::Generic => false,
        };
        #[cfg(not(target_arch = "x86_64"))]
        true
    }

    /// Whether bf16 and u8 are multiplied on AMX tiles, many times as fast as f32.
    pub(crate) fn has_tiles(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Isa::Amx;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Name as `FARFACE_ISA` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Generic => "generic",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => "neon",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => "amx",
        }
    }
}

/// The ISA in use: the best this CPU has, lowered (never raised) by the environment variable
/// `FARFACE_ISA` = `generic`, `neon`, `avx2`, `avx512` or `amx`. Read once.
pub fn detected() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        let wanted = std::env::var("FARFACE_ISA").ok();
        let weaker = Isa::unasked().into_iter().find(|isa| Some(isa.name()) == wanted.as_deref());
        weaker.unwrap_or_else(|| lower(&Isa::supported(), wanted.as_deref()))
    })
}

/// The strongest of `supported`, or the one named `wanted` where the CPU has it.
fn lower(supported: &[Isa], wanted: Option<&str>) -> Isa {
    let best = *supported.last().expect("generic is always there");
    supported.iter().copied().find(|isa| Some(isa.name()) == wanted).unwrap_or(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_only_lowers() {
        let all = Isa::supported();
        let best = *all.last().unwrap();
        assert_eq!(lower(&all, Some("generic")), Isa::Generic);
        assert_eq!(lower(&all, None), best);
        assert_eq!(lower(&all, Some("no such thing")), best);
        assert_eq!(lower(&all[..1], Some("avx512")), Isa::Generic);
    }
}
