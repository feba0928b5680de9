//! The vectors of a harvest: eight words (AVX-512), four (AVX2) or one (any CPU), and the choice of one for this CPU.
//!
//! Each method is one or a few instructions, and there are only those that the algorithm in `harvest` needs.

/// Consecutive 64-bit words of a bitmap in a register.
///
/// # Safety
/// For all methods, the CPU must have the instructions of the vector ([`Isa::available`]). Pointers must be valid for
/// `WORDS` words; pointers into a log must be aligned to the vector, pointers into a set to a word.
pub(super) trait Vector: Copy {
    /// Number of words in one vector. It divides 64.
    const WORDS: usize;
    /// Reads words of a log. Other threads may change them, so the words may be read at different times.
    unsafe fn load_log(from: *const u64) -> Self;
    /// Writes zero to words of a log.
    unsafe fn clear_log(at: *mut u64);
    /// Reads words of a set.
    unsafe fn load(from: *const u64) -> Self;
    /// Writes words of a set.
    unsafe fn store(self, at: *mut u64);
    /// The vector whose words are all zero.
    unsafe fn zero() -> Self;
    /// Word-wise `self | other`.
    unsafe fn or(self, other: Self) -> Self;
    /// Word-wise `self & !other`.
    unsafe fn and_not(self, other: Self) -> Self;
    /// Word-wise `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// Word-wise number of bits that are set.
    unsafe fn ones(self) -> Self;
    /// The sum of all words.
    unsafe fn sum(self) -> u64;
    /// The mask with bit `i` set for every word `i` that is not zero.
    unsafe fn live(self) -> u64;
}

/// The instruction sets that have a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    /// Words, on any CPU.
    Scalar,
    /// Four words.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Eight words, with a population count of their own.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// All instruction sets of this architecture, widest first.
    #[cfg(target_arch = "x86_64")]
    pub(super) const ALL: &[Isa] = &[Isa::Avx512, Isa::Avx2, Isa::Scalar];
    /// All instruction sets of this architecture, widest first.
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) const ALL: &[Isa] = &[Isa::Scalar];

    /// Returns true if this CPU has the instruction set. The result is detected once per process.
    pub(super) fn available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vpopcntdq")
                    && is_x86_feature_detected!("popcnt")
            }
        }
    }

    /// Returns true if this CPU has the instruction set and a log at `address` is aligned for it.
    pub(super) fn fits(self, address: usize) -> bool {
        self.available() && address.is_multiple_of(self.align())
    }

    /// Required alignment of a log, bytes: the size of the vector.
    pub(super) fn align(self) -> usize {
        match self {
            Isa::Scalar => 8,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => 32,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => 64,
        }
    }

    /// The widest instruction set that this CPU has and that a log at `address` is aligned for.
    pub(super) fn best_for(address: usize) -> Isa {
        Isa::ALL.iter().find(|isa| isa.fits(address)).copied().unwrap_or(Isa::Scalar)
    }
}

impl Vector for u64 {
    const WORDS: usize = 1;

    #[inline(always)]
    unsafe fn load_log(from: *const u64) -> u64 {
        // SAFETY: as the trait requires.
        u64::from_le(unsafe { from.read_volatile() })
    }

    #[inline(always)]
    unsafe fn clear_log(at: *mut u64) {
        // SAFETY: as the trait requires.
        unsafe { at.write_volatile(0) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u64) -> u64 {
        // SAFETY: as the trait requires.
        unsafe { from.read() }
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut u64) {
        // SAFETY: as the trait requires.
        unsafe { at.write(self) }
    }

    #[inline(always)]
    unsafe fn zero() -> u64 {
        0
    }

    #[inline(always)]
    unsafe fn or(self, other: u64) -> u64 {
        self | other
    }

    #[inline(always)]
    unsafe fn and_not(self, other: u64) -> u64 {
        self & !other
    }

    #[inline(always)]
    unsafe fn add(self, other: u64) -> u64 {
        self.wrapping_add(other)
    }

    #[inline(always)]
    unsafe fn ones(self) -> u64 {
        self.count_ones().into()
    }

    #[inline(always)]
    unsafe fn sum(self) -> u64 {
        self
    }

    #[inline(always)]
    unsafe fn live(self) -> u64 {
        (self != 0).into()
    }
}

/// The x86 vectors. Each method executes the instruction of the same name, whose needs are those of the trait.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Vector;

    impl Vector for __m256i {
        const WORDS: usize = 4;

        #[inline(always)]
        unsafe fn load_log(from: *const u64) -> __m256i {
            // SAFETY: as the trait requires.
            unsafe { from.cast::<__m256i>().read_volatile() }
        }

        #[inline(always)]
        unsafe fn clear_log(at: *mut u64) {
            // SAFETY: as the trait requires.
            unsafe { at.cast::<__m256i>().write_volatile(_mm256_setzero_si256()) }
        }

        #[inline(always)]
        unsafe fn load(from: *const u64) -> __m256i {
            // SAFETY: as the trait requires.
            unsafe { _mm256_loadu_si256(from.cast()) }
        }

        #[inline(always)]
        unsafe fn store(self, at: *mut u64) {
            // SAFETY: as the trait requires.
            unsafe { _mm256_storeu_si256(at.cast(), self) }
        }

        #[inline(always)]
        unsafe fn zero() -> __m256i {
            // SAFETY: as the trait requires.
            unsafe { _mm256_setzero_si256() }
        }

        #[inline(always)]
        unsafe fn or(self, other: __m256i) -> __m256i {
            // SAFETY: as the trait requires.
            unsafe { _mm256_or_si256(self, other) }
        }

        #[inline(always)]
        unsafe fn and_not(self, other: __m256i) -> __m256i {
            // SAFETY: as the trait requires.
            unsafe { _mm256_andnot_si256(other, self) }
        }

        #[inline(always)]
        unsafe fn add(self, other: __m256i) -> __m256i {
            // SAFETY: as the trait requires.
            unsafe { _mm256_add_epi64(self, other) }
        }

        /// Looks up the bit count of every half byte and sums the bytes of each word, as AVX2 has no population count.
        #[inline(always)]
        unsafe fn ones(self) -> __m256i {
            // SAFETY: as the trait requires.
            unsafe {
                let counts = _mm256_setr_epi8(
                    0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, //
                    0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                );
                let half = _mm256_set1_epi8(0xf);
                let low = _mm256_shuffle_epi8(counts, _mm256_and_si256(self, half));
                let high = _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(self, 4), half));
                _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256())
            }
        }

        #[inline(always)]
        unsafe fn sum(self) -> u64 {
            let mut words = [0u64; 4];
            // SAFETY: the array has the size of the vector.
            unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), self) };
            words.iter().sum()
        }

        #[inline(always)]
        unsafe fn live(self) -> u64 {
            // SAFETY: as the trait requires.
            let zero = unsafe { _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(self, Self::zero()))) };
            u64::from(!zero.cast_unsigned() & 0xf)
        }
    }

    impl Vector for __m512i {
        const WORDS: usize = 8;

        #[inline(always)]
        unsafe fn load_log(from: *const u64) -> __m512i {
            // SAFETY: as the trait requires.
            unsafe { from.cast::<__m512i>().read_volatile() }
        }

        #[inline(always)]
        unsafe fn clear_log(at: *mut u64) {
            // SAFETY: as the trait requires.
            unsafe { at.cast::<__m512i>().write_volatile(_mm512_setzero_si512()) }
        }

        #[inline(always)]
        unsafe fn load(from: *const u64) -> __m512i {
            // SAFETY: as the trait requires.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        unsafe fn store(self, at: *mut u64) {
            // SAFETY: as the trait requires.
            unsafe { _mm512_storeu_si512(at.cast(), self) }
        }

        #[inline(always)]
        unsafe fn zero() -> __m512i {
            // SAFETY: as the trait requires.
            unsafe { _mm512_setzero_si512() }
        }

        #[inline(always)]
        unsafe fn or(self, other: __m512i) -> __m512i {
            // SAFETY: as the trait requires.
            unsafe { _mm512_or_si512(self, other) }
        }

        #[inline(always)]
        unsafe fn and_not(self, other: __m512i) -> __m512i {
            // SAFETY: as the trait requires.
            unsafe { _mm512_andnot_si512(other, self) }
        }

        #[inline(always)]
        unsafe fn add(self, other: __m512i) -> __m512i {
            // SAFETY: as the trait requires.
            unsafe { _mm512_add_epi64(self, other) }
        }

        #[inline(always)]
        unsafe fn ones(self) -> __m512i {
            // SAFETY: as the trait requires.
            unsafe { _mm512_popcnt_epi64(self) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> u64 {
            // SAFETY: as the trait requires.
            unsafe { _mm512_reduce_add_epi64(self) }.cast_unsigned()
        }

        #[inline(always)]
        unsafe fn live(self) -> u64 {
            // SAFETY: as the trait requires.
            unsafe { _mm512_test_epi64_mask(self, self) }.into()
        }
    }
}
