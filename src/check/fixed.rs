//! A fixed disk: only its last sector is a structure.

use super::code::Code;
use super::footer;
use super::report::Report;
use crate::vhd::Footer;

/// Checks the footer of a fixed disk, which [`crate::layer::fixed_footer`] has found.
pub(super) fn check(report: &mut Report, footer: &Footer) {
    let at = footer.current_size;
    footer::check(report, footer, at);
    if report.file_bytes - at < Footer::SIZE as u64 {
        report.add(Code::FooterShort, "footer", at, "it has 511 bytes");
    }
}
