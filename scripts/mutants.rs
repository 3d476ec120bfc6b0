//! The crate that `scripts/mutants check` makes: the checker, over the rest of the library, with its tests.

pub use engine::*;
pub mod check;

#[cfg(test)]
extern crate self as cowvhd;

/// One failure is all that is asked for: the first ends the tests.
#[cfg(test)]
#[used]
#[unsafe(link_section = ".init_array")]
static END_WITH_THE_FIRST_FAILURE: extern "C" fn() = {
    extern "C" fn set() {
        std::panic::set_hook(Box::new(|panic| {
            use std::io::Write;
            // Past the capture of a test's output, which would be lost.
            let _ = writeln!(std::io::stderr(), "{panic}");
            std::process::exit(101)
        }));
    }
    set
};

