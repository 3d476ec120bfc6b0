//! Where a server listens, as users write it.

use crate::server::ServeError;
use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAddress {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

impl NbdAddress {
    /// Reads `unix:PATH`, `tcp:HOST:PORT` (an IPv6 host in brackets) or a bare path.
    ///
    /// # Errors
    ///
    /// [`ServeError::Address`] for an empty path, a host that is unknown or a port that is none.
    pub fn parse(text: &str) -> Result<Self, ServeError> {
        let wrong = |why: String| ServeError::Address { address: text.to_string(), why };
        if let Some(tcp) = text.strip_prefix("tcp:") {
            let mut found =
                tcp.to_socket_addrs().map_err(|error| wrong(format!("{error}; expected tcp:HOST:PORT")))?;
            return found.next().map(NbdAddress::Tcp).ok_or_else(|| wrong("the host has no address".into()));
        }
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.is_empty() {
            return Err(wrong("expected unix:PATH, tcp:HOST:PORT or a path".into()));
        }
        Ok(NbdAddress::Unix(path.into()))
    }
}

impl FromStr for NbdAddress {
    type Err = ServeError;

    fn from_str(text: &str) -> Result<Self, ServeError> {
        NbdAddress::parse(text)
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdAddress::Unix(path) => write!(f, "unix:{}", path.display()),
            NbdAddress::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_they_print() {
        for text in ["unix:/run/vm.sock", "tcp:127.0.0.1:10809", "tcp:[::1]:10809", "unix:relative/a b.sock"]
        {
            assert_eq!(NbdAddress::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(NbdAddress::parse("/run/x").unwrap(), NbdAddress::Unix("/run/x".into()));
        for text in ["", "unix:", "tcp:", "tcp:127.0.0.1", "tcp:127.0.0.1:port", "tcp:127.0.0.1:65536"] {
            let error = NbdAddress::parse(text).unwrap_err().to_string();
            assert!(error.contains(&format!("\"{text}\"")), "{error}");
        }
    }
}
