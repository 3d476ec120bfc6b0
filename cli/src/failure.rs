//! Why a command failed, in words that say what to do next, and its exit code.

use cowvhd::ErrorKind;
use cowvhd_export::ServeError;
use std::fmt;
use std::io;
use std::process::ExitCode;

/// The exit codes of every verb; scripts rely on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    Done = 0,
    Failed = 1,
    /// The command line cannot be used, whatever the files are like.
    Usage = 16,
    /// Interrupted before the work was complete.
    Cancelled = 32,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        ExitCode::from(code as u8)
    }
}

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    code: Code,
    message: String,
    /// Somebody has the file open.
    in_use: bool,
}

impl Failure {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self::with_code(Code::Failed, message.into())
    }

    /// The command line cannot be used.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::with_code(Code::Usage, message.into())
    }

    pub(crate) fn with_code(code: Code, message: String) -> Self {
        Failure { code, message, in_use: false }
    }

    /// Of a verb that would have asked the server of the disk, and found none.
    pub(crate) fn without_server(mut self) -> Self {
        if self.in_use {
            self.message.push_str(
                "; if that is a server that was started with --control, name its socket the same way",
            );
        }
        self
    }

    pub(crate) fn code(&self) -> Code {
        self.code
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<cowvhd::Error> for Failure {
    fn from(error: cowvhd::Error) -> Self {
        let code = match error.kind() {
            ErrorKind::InvalidInput => Code::Usage,
            ErrorKind::Cancelled => Code::Cancelled,
            _ => Code::Failed,
        };
        let hint = match &error {
            cowvhd::Error::InUse { holder: Some(_), .. } => "; end it, or wait until it ends".into(),
            cowvhd::Error::InUse { path, .. } => {
                format!("; end what has it open (\"fuser -v {}\" may name it)", path.display())
            }
            cowvhd::Error::Io { source, .. } => io_hint(source).into(),
            _ => String::new(),
        };
        let in_use = error.kind() == ErrorKind::InUse;
        Failure { in_use, ..Self::with_code(code, format!("{error}{hint}")) }
    }
}

fn io_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; check the path, or make a disk there with \"cowvhd create\"",
        io::ErrorKind::PermissionDenied => "; check who owns the file and its directory",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space and try again",
        _ => "",
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        let code = match &error {
            ServeError::Address { .. } | ServeError::RemoteNotAllowed { .. } => Code::Usage,
            _ => Code::Failed,
        };
        let hint = match &error {
            ServeError::Bind { source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse => {
                    "; another server listens there: end it, or choose another place with --nbd"
                }
                io::ErrorKind::InvalidFilename => {
                    "; a socket's path may have 107 bytes: choose a shorter one with --nbd"
                }
                io::ErrorKind::PermissionDenied => "; choose another place with --nbd",
                _ => "",
            },
            ServeError::RemoteNotAllowed { .. } => " (--allow-remote)",
            _ => "",
        };
        Self::with_code(code, format!("{error}{hint}"))
    }
}
