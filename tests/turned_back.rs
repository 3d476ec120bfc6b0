//! Somebody turns the dirty cookie of an image back by hand, so that other programs open it, while the journal holds what was flushed.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/summary.rs"]
mod summary;
#[path = "support/turned_back.rs"]
mod turned_back;

use cowvhd::sim::Bounds;

#[test]
fn what_the_journal_holds_is_never_lost_in_silence() {
    let mut found = 0;
    for seed in 0..24 {
        let judged = turned_back::turned_back(seed, &Bounds::sample(6));
        found += judged.unwrap_or_else(|what| panic!("seed {seed}: {what}"));
    }
    summary::add(&format!(
        "cookies turned back: {found} states of which the journal alone held something, none of it lost in silence"
    ));
    assert!(found > 100, "{found}");
}

#[test]
fn a_closed_image_is_not_suspected() {
    for seed in 0..30 {
        turned_back::closed(seed).unwrap_or_else(|what| panic!("seed {seed}: {what}"));
    }
}
