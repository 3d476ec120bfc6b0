//! The one error type of the library, and the errors of the pure format code beneath it.
//!
//! An error says what happened, where (path, field, offset), what was expected and what to do. [`Error::kind`] groups
//! errors for programs; [`Error::errno`] gives the value a guest or a C caller should see.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A structure on disk that does not hold what it must: the pure code in `vhd` and `ext` knows no file names, so the
/// caller adds the path with [`FormatError::at`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatError {
    /// The structure, e.g. `"footer"`, `"dynamic header"`, `"superblock"`.
    pub structure: &'static str,
    /// The field inside it, e.g. `"checksum"`.
    pub field: &'static str,
    /// Byte offset of the field from the start of the structure.
    pub offset: u64,
    /// What was found there, ready for printing.
    pub found: String,
    /// What would have been right, ready for printing.
    pub expected: String,
}

impl FormatError {
    /// A new error for `field` at byte `offset` of `structure`.
    pub fn new(
        structure: &'static str,
        field: &'static str,
        offset: u64,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        FormatError { structure, field, offset, found: found.to_string(), expected: expected.to_string() }
    }

    /// Adds the file and the byte offset in it at which the structure starts.
    pub fn at(self, path: &Path, structure_offset: u64) -> Error {
        Error::Format { path: path.to_path_buf(), structure_offset, source: self }
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: field {} (byte {}) is {}, expected {}",
            self.structure, self.field, self.offset, self.found, self.expected
        )
    }
}

impl std::error::Error for FormatError {}

/// What went wrong with an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("{}: {operation} failed: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried, with offset and length where it has them.
        operation: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A structure on disk is wrong.
    #[error("{}: at offset {structure_offset}: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where the structure starts in the file, in bytes.
        structure_offset: u64,
        /// Which field, and what it holds.
        source: FormatError,
    },
    /// The image's structures contradict each other or are damaged beyond what open may mend.
    #[error("{}: {what}; {hint}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is damaged, and where.
        what: String,
        /// What to do next.
        hint: &'static str,
    },
    /// The parent of another image was not closed: it holds less than its journal says.
    #[error("{}: it is the parent of another image, and was not closed; open it, or the disk over it, for writing once, which recovers it (`cowvhd serve`, then ^C)", path.display())]
    NotClosed {
        /// The parent.
        path: PathBuf,
    },
    /// The parent of a differencing image was not found, or not where it may lie.
    #[error("{}: {what}; {hint}", path.display())]
    ParentMissing {
        /// The child.
        path: PathBuf,
        /// Which id was looked for, where, and why each place did not do.
        what: String,
        /// What to do next.
        hint: &'static str,
    },
    /// A VM state is incomplete, was changed, or belongs to another disk or to another moment of the disk.
    #[error("{}: {what}; {hint}", path.display())]
    StateMismatch {
        /// The file of the state.
        path: PathBuf,
        /// What was found, and what should be there.
        what: String,
        /// What to do next.
        hint: &'static str,
    },
    /// The image uses something this version does not know or the operation does not apply to it.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is not supported, and what to do instead.
        what: String,
    },
    /// Another process has the image open in a way that excludes this one.
    #[error("{}: in use{}", path.display(), holder.as_ref().map(|h| format!(" by {h}")).unwrap_or_default())]
    InUse {
        /// The file.
        path: PathBuf,
        /// The process that holds it, where the system tells.
        holder: Option<String>,
    },
    /// What was named is not there.
    #[error("{}: {what}", path.display())]
    NotFound {
        /// The file.
        path: PathBuf,
        /// What was looked for, and where.
        what: String,
    },
    /// The file to be created exists already.
    #[error("{}: exists already; choose another name or remove it first", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The disk was opened read-only.
    #[error("{}: the disk is open read-only", path.display())]
    ReadOnly {
        /// The file.
        path: PathBuf,
    },
    /// The image is sealed: it is a snapshot, or others were made over it, and it never changes.
    #[error("{}: {what}; make a disk to write to over it with `cowvhd clone`", path.display())]
    Sealed {
        /// The file.
        path: PathBuf,
        /// As what it was sealed.
        what: String,
    },
    /// An access that does not lie within the disk, or is not a whole number of sectors.
    #[error("access of {length} bytes at offset {offset} does not fit a disk of {size} bytes: {why}")]
    OutOfRange {
        /// Guest byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Size of the disk in bytes.
        size: u64,
        /// Which rule it breaks.
        why: &'static str,
    },
    /// A size, name or option that cannot be used.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it, and what is accepted.
        what: String,
    },
    /// No space is left for another block.
    #[error("{}: no space left: {what}", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Which limit was met.
        what: String,
    },
    /// The caller ended the work before it was complete; nothing of it stays.
    #[error("{}: cancelled; nothing was made", path.display())]
    Cancelled {
        /// The file that was to be made.
        path: PathBuf,
    },
    /// The caller ended work that is done in steps; what was done stays, and started again it goes on from there.
    #[error("{}: stopped; nothing is lost, and started again it goes on where it was", path.display())]
    Stopped {
        /// The file that was worked on.
        path: PathBuf,
    },
    /// An earlier sync failed, so that it is unknown what reached the medium; the disk accepts nothing more.
    #[error("{}: stopped after a failed sync ({cause}); close and open the disk again to recover it", path.display())]
    Poisoned {
        /// The file.
        path: PathBuf,
        /// The first failure.
        cause: String,
    },
}

/// The result of this library's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What an error means to a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused an operation.
    Io,
    /// The image is damaged or no image.
    Corrupt,
    /// The parent of a differencing image is missing or not allowed.
    ParentMissing,
    /// A VM state that is incomplete, was changed or does not belong to the disk.
    StateMismatch,
    /// A feature or a kind of image that is not supported.
    Unsupported,
    /// Held by another process.
    InUse,
    /// What was named is not there.
    NotFound,
    /// The target exists.
    Exists,
    /// Write to a read-only disk.
    ReadOnly,
    /// Write to a sealed image.
    Sealed,
    /// Access outside the disk, unaligned, or an option that cannot be used.
    InvalidInput,
    /// No space left.
    NoSpace,
    /// Ended by the caller before it was complete.
    Cancelled,
    /// Stopped after a failed sync.
    Poisoned,
}

impl Error {
    /// The group this error belongs to.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Io { source, .. } if is_no_space(source) => ErrorKind::NoSpace,
            Error::Io { .. } => ErrorKind::Io,
            Error::Format { .. } | Error::Damaged { .. } | Error::NotClosed { .. } => ErrorKind::Corrupt,
            Error::ParentMissing { .. } => ErrorKind::ParentMissing,
            Error::StateMismatch { .. } => ErrorKind::StateMismatch,
            Error::Unsupported { .. } => ErrorKind::Unsupported,
            Error::InUse { .. } => ErrorKind::InUse,
            Error::NotFound { .. } => ErrorKind::NotFound,
            Error::Exists { .. } => ErrorKind::Exists,
            Error::ReadOnly { .. } => ErrorKind::ReadOnly,
            Error::Sealed { .. } => ErrorKind::Sealed,
            Error::OutOfRange { .. } | Error::Invalid { .. } => ErrorKind::InvalidInput,
            Error::NoSpace { .. } => ErrorKind::NoSpace,
            Error::Cancelled { .. } | Error::Stopped { .. } => ErrorKind::Cancelled,
            Error::Poisoned { .. } => ErrorKind::Poisoned,
        }
    }

    /// The Linux errno a guest, an NBD client or a C caller should see (a positive number).
    pub fn errno(&self) -> i32 {
        const ENOENT: i32 = 2;
        const EIO: i32 = 5;
        const EBUSY: i32 = 16;
        const EEXIST: i32 = 17;
        const EINVAL: i32 = 22;
        const ENOSPC: i32 = 28;
        const EROFS: i32 = 30;
        const EOPNOTSUPP: i32 = 95;
        const ESTALE: i32 = 116;
        const ECANCELED: i32 = 125;
        match self.kind() {
            ErrorKind::NoSpace => ENOSPC,
            ErrorKind::Io => match self {
                Error::Io { source, .. } => source.raw_os_error().unwrap_or(EIO),
                _ => EIO,
            },
            ErrorKind::Corrupt | ErrorKind::Poisoned => EIO,
            ErrorKind::ParentMissing | ErrorKind::NotFound => ENOENT,
            ErrorKind::StateMismatch => ESTALE,
            ErrorKind::Unsupported => EOPNOTSUPP,
            ErrorKind::InUse => EBUSY,
            ErrorKind::Exists => EEXIST,
            ErrorKind::ReadOnly | ErrorKind::Sealed => EROFS,
            ErrorKind::InvalidInput => EINVAL,
            ErrorKind::Cancelled => ECANCELED,
        }
    }

    /// An [`Error::Io`] for `operation` on `path`.
    pub(crate) fn io(path: &Path, operation: impl Into<String>, source: io::Error) -> Self {
        Error::Io { path: path.to_path_buf(), operation: operation.into(), source }
    }
}

pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}
