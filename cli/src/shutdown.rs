//! SIGTERM and ^C: the first ends the server in good order, a further ^C gives up on that.
//!
//! The handlers are in place before the disk is opened, so that there is no moment at which a signal leaves the disk
//! unclosed.

use crate::failure::{Code, Failure};
use crate::output;
use cowvhd_export::ShutdownHandle;
use parking_lot::Mutex;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::sync::Arc;

/// Waits for the signals on a thread of its own.
pub(crate) struct Shutdown {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    requested: bool,
    server: Option<ShutdownHandle>,
}

impl Shutdown {
    /// Handles the signals from now on.
    pub(crate) fn install() -> Result<Self, Failure> {
        let failed = |error| Failure::new(format!("cannot handle signals: {error}"));
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
        let state = Arc::<Mutex<State>>::default();
        let shared = Arc::clone(&state);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    on_signal(&shared, signal);
                }
            })
            .map_err(failed)?;
        Ok(Shutdown { state })
    }

    /// The server to end; at once, if a signal has come already.
    pub(crate) fn attach(&self, server: ShutdownHandle) {
        let mut state = self.state.lock();
        if state.requested {
            server.shutdown();
        }
        state.server = Some(server);
    }
}

fn on_signal(state: &Mutex<State>, signal: i32) {
    let mut state = state.lock();
    if !state.requested {
        state.requested = true;
        if let Some(server) = &state.server {
            server.shutdown();
        }
        output::say("ending: finishing requests, then closing the disk");
    } else if signal == SIGINT {
        output::say("interrupted again: the disk is left unclosed, the next open recovers it");
        std::process::exit(Code::Cancelled as i32);
    }
}
