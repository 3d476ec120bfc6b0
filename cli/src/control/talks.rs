//! Who is connected to the control socket: so many at once. When all places are taken, whoever has asked for nothing for the longest
//! time gives way to a newcomer, so that none who connects and is silent keeps others out; whoever's request is being carried out stays.

use super::protocol::{Answer, send};
use crate::failure::Failure;
use parking_lot::Mutex;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Clients at once.
const MAX_CLIENTS: usize = 8;

/// What a client's thread is at.
#[derive(Debug, Clone, Copy)]
enum State {
    /// It has waited for a request since then.
    Waits(Instant),
    Works,
    /// The client has given way.
    Dismissed,
}

/// The part of it that a client's thread has.
#[derive(Debug, Clone)]
pub(super) struct Attention(Arc<Mutex<State>>);

impl Attention {
    fn new() -> Self {
        Attention(Arc::new(Mutex::new(State::Waits(Instant::now()))))
    }

    /// From now on the client may be dismissed.
    pub(super) fn wait(&self) {
        *self.0.lock() = State::Waits(Instant::now());
    }

    /// From now on it may not; false where it has been.
    pub(super) fn work(&self) -> bool {
        let mut state = self.0.lock();
        let stays = matches!(*state, State::Waits(_));
        if stays {
            *state = State::Works;
        }
        stays
    }

    fn waits_since(&self) -> Option<Instant> {
        match *self.0.lock() {
            State::Waits(since) => Some(since),
            State::Works | State::Dismissed => None,
        }
    }

    /// False where a request has come meanwhile.
    fn dismiss(&self) -> bool {
        let mut state = self.0.lock();
        let waits = matches!(*state, State::Waits(_));
        if waits {
            *state = State::Dismissed;
        }
        waits
    }
}

/// A client that is being talked to.
struct Talk {
    stream: UnixStream,
    attention: Attention,
    thread: JoinHandle<()>,
}

impl Talk {
    fn dismiss(self) {
        // A client that has left much unread does without.
        let _ = self.stream.set_write_timeout(Some(Duration::from_millis(1)));
        let what = "other clients needed the place of one that asked for nothing; connect again";
        let _ = send(&mut &self.stream, &Answer::of(Err(Failure::new(what))));
        let _ = self.stream.shutdown(Shutdown::Both);
        let _ = self.thread.join();
    }
}

/// All of them.
#[derive(Default)]
pub(super) struct Talks(Vec<Talk>);

impl Talks {
    /// Has `talk` talk to a newcomer in a thread of its own, or turns it away.
    pub(super) fn begin(
        &mut self,
        stream: UnixStream,
        talk: impl FnOnce(&UnixStream, &Attention) + Send + 'static,
    ) {
        self.0.retain(|talk| !talk.thread.is_finished());
        if self.0.len() >= MAX_CLIENTS && !self.make_room() {
            let busy = format!(
                "{MAX_CLIENTS} clients of the control socket wait for what they asked for; try again later"
            );
            let _ = send(&mut &stream, &Answer::of(Err(Failure::new(busy))));
            return;
        }
        // Without a thread the client sees its connection end.
        self.0.extend(start(stream, talk));
    }

    fn make_room(&mut self) -> bool {
        let waiting =
            self.0.iter().enumerate().filter_map(|(at, talk)| Some((talk.attention.waits_since()?, at)));
        let Some((_, at)) = waiting.min() else { return false };
        self.0[at].attention.dismiss() && {
            self.0.remove(at).dismiss();
            true
        }
    }

    /// What is being done is finished and answered; nothing further is read.
    pub(super) fn end(self) {
        for talk in self.0 {
            let _ = talk.stream.shutdown(Shutdown::Read);
            let _ = talk.thread.join();
        }
    }
}

fn start(
    stream: UnixStream,
    talk: impl FnOnce(&UnixStream, &Attention) + Send + 'static,
) -> io::Result<Talk> {
    let (own, attention) = (stream.try_clone()?, Attention::new());
    let its = attention.clone();
    let thread = std::thread::Builder::new().name("control client".into()).spawn(move || {
        talk(&own, &its);
        // The acceptor has a copy of the socket.
        let _ = own.shutdown(Shutdown::Both);
    })?;
    Ok(Talk { stream, attention, thread })
}

#[cfg(test)]
mod tests {
    use super::super::protocol::receive;
    use super::*;
    use std::io::{BufReader, Read};
    use std::sync::mpsc::{Receiver, channel};

    /// A client whose thread works until it is told to end, once a byte came.
    fn newcomer(talks: &mut Talks, end: Receiver<()>) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        talks.begin(near, move |stream, attention| {
            if (&mut &*stream).read(&mut [0; 1]).is_ok_and(|count| count > 0) && attention.work() {
                send(&mut &*stream, &"works").unwrap();
                let _ = end.recv();
            }
        });
        far
    }

    fn line(client: &UnixStream) -> Option<String> {
        receive(&mut BufReader::new(client)).unwrap()
    }

    #[test]
    fn those_that_ask_for_nothing_give_way_and_those_at_work_do_not() {
        let mut talks = Talks::default();
        let mut ends = Vec::new();
        let mut come = |talks: &mut Talks| {
            let (end, ended) = channel();
            ends.push(end);
            newcomer(talks, ended)
        };
        // A thousand of them leave eight threads, and the oldest go first.
        let mut silent: Vec<UnixStream> = (0..1000).map(|_| come(&mut talks)).collect();
        assert_eq!(talks.0.len(), MAX_CLIENTS);
        let mut stay = silent.split_off(1000 - MAX_CLIENTS);
        for client in &silent {
            let said = line(client).unwrap();
            assert!(said.contains("connect again"), "{said}");
            assert_eq!(line(client), None);
        }
        // The first of them has been asked for something.
        io::Write::write_all(&mut &stay[0], b"x").unwrap();
        assert_eq!(line(&stay[0]).unwrap(), "\"works\"");
        stay.push(come(&mut talks));
        assert!(line(&stay[1]).unwrap().contains("connect again"));
        stay.remove(1);
        for client in &stay[1..] {
            io::Write::write_all(&mut &*client, b"x").unwrap();
            assert_eq!(line(client).unwrap(), "\"works\"");
        }
        // Nobody gives way any more.
        let refused = come(&mut talks);
        assert!(line(&refused).unwrap().contains("try again later"));
        assert_eq!(line(&refused), None);
        drop(ends);
        talks.end();
        for client in &stay {
            assert_eq!(line(client), None);
        }
    }
}
