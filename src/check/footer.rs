//! Fields of a footer that no reader needs, and that some programs look at all the same.

use super::code::Code;
use super::report::Report;
use crate::vhd::{Chs, Footer};

/// Notes what is unusual about the footer at `offset`, and what the disk is.
pub(super) fn check(report: &mut Report, footer: &Footer, offset: u64) {
    report.disk_type = Some(footer.disk_type);
    report.virtual_size = Some(footer.current_size);
    let (found, right) = (footer.geometry, Chs::for_size(footer.current_size));
    if found != right {
        let text = |chs: Chs| format!("{}/{}/{}", chs.cylinders, chs.heads, chs.sectors_per_track);
        let what = format!("it is {}, the size gives {}", text(found), text(right));
        report.add(Code::Geometry, "footer", offset + 56, what);
    }
    if footer.saved_state != 0 {
        report.add(Code::SavedState, "footer", offset + 84, format!("it is {}", footer.saved_state));
    }
    if footer.reserved.iter().any(|&byte| byte != 0) {
        report.add(Code::ReservedBytes, "footer", offset + 85, "they are not zero");
    }
}
