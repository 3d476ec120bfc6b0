//! What can be found: stable codes, how bad each is, what it means for the guest's data and what a repair does about it.
//!
//! docs/check.md shows the same table; a test compares the two.

use std::fmt;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Note,
    /// Space in the file that nothing uses.
    Leak,
    /// All data can be read, and something that protects it, or that other programs need, is missing.
    Risk,
    /// Data cannot be read, or not reliably.
    Corruption,
}

impl Severity {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Severity::Note => "note",
            Severity::Leak => "leak",
            Severity::Risk => "risk",
            Severity::Corruption => "corruption",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

macro_rules! codes {
    ($($variant:ident $code:literal $severity:ident, $means:literal, $repair:literal;)*) => {
        /// What a finding is about. The words of [`Code::as_str`] never change their meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $(#[doc = concat!("`", $code, "`: ", $means)] $variant,)*
        }

        impl Code {
            /// All codes, in the order of the documentation.
            pub const ALL: &[Code] = &[$(Code::$variant,)*];

            /// The stable name.
            pub const fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $code,)* }
            }

            /// How bad it is.
            pub const fn severity(self) -> Severity {
                match self { $(Code::$variant => Severity::$severity,)* }
            }

            /// What it means for the guest's data.
            pub const fn means(self) -> &'static str {
                match self { $(Code::$variant => $means,)* }
            }

            /// What a repair does about it.
            pub const fn repair(self) -> &'static str {
                match self { $(Code::$variant => $repair,)* }
            }
        }
    };
}

codes! {
    HeadersLost "headers-lost" Corruption,
        "the disk cannot be opened; its data may all be there",
        "-y: footer and header are made again if a backup, a superblock or the block headers still tell what they said";
    FrontDamaged "front-damaged" Risk,
        "none is lost; other programs refuse the file",
        "-p: the start of the file is written again from the backup, or from the footer at the end";
    FooterDamaged "footer-damaged" Risk,
        "none is lost; other programs refuse the file",
        "-p: the footer is written again from the copy at the start";
    FootersDiffer "footers-differ" Risk,
        "none is lost; programs disagree on what the disk is, and it is not opened for writing",
        "-y: the one that the file is built by is written over the other";
    FooterShort "footer-short" Note,
        "none is lost; some programs refuse a footer of 511 bytes",
        "nothing";
    BackupDamaged "backup-damaged" Risk,
        "none is lost; damage to the start of the file would be worse",
        "-p: the backup is written again from the start of the file";
    BackupOutdated "backup-outdated" Note,
        "none is lost; another program changed footer or header",
        "nothing: the next open for writing renews it";
    SuperblockDamaged "superblock-damaged" Risk,
        "none is lost; the other superblock counts",
        "-p: it is written again";
    SuperblockSequence "superblock-sequence" Risk,
        "both superblocks claim to be the newest; B counts",
        "-p: both are written again";
    SuperblocksLost "superblocks-lost" Risk,
        "none is lost; the disk counts as one that another program made, without the journal and the seal that it had",
        "-y: both are made again from the header, the table and the block headers";
    SuperblockOther "superblock-other-disk" Note,
        "none is lost; another program gave the disk a new unique id, so that it is an ordinary VHD now",
        "nothing";
    LayoutWrong "layout-wrong" Corruption,
        "the disk cannot be opened: header or superblock name places that cannot be",
        "nothing: `--salvage` reads what can be read";
    SyncFailed "sync-failed" Risk,
        "a sync failed in an earlier session: data that was acknowledged then may be missing",
        "-y: the mark is taken away if all else is in order; it brings nothing back";
    ForeignChanges "foreign-changes" Note,
        "none is lost; another program has written to the file since it was closed here",
        "nothing";
    NotClosed "not-closed" Note,
        "none is lost; the file was not closed and is judged as recovery would leave it",
        "-p: it is recovered and closed";
    SnapshotUnfinished "snapshot-unfinished" Note,
        "none is lost; a snapshot, perhaps with a VM state, was cut before its end",
        "-p: it is finished, or what there is of it is taken away, as the next open for writing does";
    RevertUnfinished "revert-unfinished" Note,
        "none is lost; a revert was cut before its end, and the new file that it made is left",
        "nothing: the next revert takes it away";
    StateIncomplete "state-incomplete" Note,
        "none is lost; parts of a VM state are there without the manifest that makes them one",
        "nothing: put the manifest back from a backup, or remove them";
    JournalLost "journal-lost" Corruption,
        "the file was not closed and both superblocks are gone: what was flushed last may be missing",
        "-y: the table is made again from the block headers, what only the journal held is lost";
    JournalDamaged "journal-damaged" Corruption,
        "the file was not closed and its journal has a gap: what was flushed last may be missing",
        "-y: the entries that are whole are replayed, what the others held is lost";
    JournalNotReplayed "journal-not-replayed" Corruption,
        "somebody turned the cookie of an image back that was not closed: what was flushed last may be missing, and the disk is not opened for writing",
        "-y: the journal counts again and is replayed over the file as it stands, unless blocks contradict each other then";
    Geometry "geometry" Note,
        "none is lost; cylinders, heads and sectors are not those that the size gives",
        "nothing";
    SavedState "saved-state" Note,
        "none is lost; the footer says that a machine was saved while it used the disk",
        "nothing";
    ReservedBytes "reserved-bytes" Note,
        "none is lost; some programs refuse a footer or header whose reserved bytes are not zero",
        "nothing";
    ExtraEntries "extra-entries" Note,
        "none is lost; the table has more entries than the disk has blocks, which some programs refuse",
        "nothing";
    BatDamaged "bat-damaged" Corruption,
        "blocks read as zeros or as other blocks",
        "-p: the table is made again from the block headers, which give exactly what the last close left";
    BatRange "bat-range" Corruption,
        "the block cannot be read: its entry points past the end of the file",
        "-y: the entry is taken from the block's header, or else cleared: the block reads as zeros; of one that the end of the file cuts, what is left of it stays";
    BatMetadata "bat-metadata" Corruption,
        "the block cannot be read: its entry points into metadata",
        "-y: the entry is taken from the block's header, or else cleared: the block reads as zeros";
    BatOverlap "bat-overlap" Corruption,
        "two blocks share space in the file: a write to one changes the other",
        "-y: the block headers tell whose it is; where they do not, each block gets a copy of its own";
    BatBeyondDisk "bat-beyond-disk" Leak,
        "none is lost; entries behind the end of the disk are allocated",
        "-y: the entries are cleared";
    BlockHeader "block-header" Corruption,
        "the block may show another block's data, and cannot be read",
        "-y: the entry is taken from the right header; if there is none, the header is made again";
    AllocationSequence "allocation-sequence" Risk,
        "none is lost; a table made again later could prefer the wrong header",
        "-p: the superblock counts on from the highest number";
    BitmapClear "bitmap-clear" Corruption,
        "sectors read as zeros although they were written",
        "-p: the bits are set";
    BitmapHidden "bitmap-hidden-data" Risk,
        "sectors read as zeros, and the data beneath is not zero: programs that ignore bitmaps show it",
        "nothing: the file does not tell which is right";
    BitmapPastEnd "bitmap-past-end" Note,
        "none is lost; bits are set for sectors behind the end of the disk",
        "nothing";
    BitmapsAllSet "bitmaps-all-set" Note,
        "every block hides the parent entirely: perhaps a program that ignores parents wrote to this disk",
        "nothing";
    ParentId "parent-id" Risk,
        "the parent cannot be recognised: its unique id in the header is zero",
        "nothing";
    Locator "locator" Risk,
        "none is lost; the parent may not be found by this locator",
        "nothing";
    LocatorsDisagree "locators-disagree" Note,
        "none is lost; the locators name parents of different names",
        "nothing";
    ParentMissing "parent-missing" Corruption,
        "the disk cannot be opened: its parent was not found; what this file holds is all there",
        "nothing: put the parent back, or allow its folder (`--allow-parents-in`)";
    ParentMoved "parent-moved" Corruption,
        "the disk cannot be opened: its parent is not where it says; it was found elsewhere",
        "`--relink`: the disk names the place where its parent is";
    ParentLoop "parent-loop" Corruption,
        "the disk cannot be opened: its chain of parents comes back to itself",
        "nothing: the file does not tell which parent was right";
    ChainTooDeep "chain-too-deep" Corruption,
        "the disk cannot be opened: its chain has more layers than are ever opened",
        "nothing";
    ParentNotClosed "parent-not-closed" Corruption,
        "disks over this one cannot be opened until it is recovered; what they show may have changed",
        "nothing here: a repair of this parent, with -p, recovers it";
    ParentChanged "parent-changed" Corruption,
        "what the disk shows may have changed: its parent was written to after the disk was made",
        "nothing: no file tells what the parent held";
    ParentTime "parent-time" Note,
        "none is lost if the parent was only copied: it has another time of change than the disk noted",
        "nothing";
    ParentSize "parent-size" Note,
        "none is lost; the parent has another size: behind its end are zeros, and some programs refuse the chain",
        "nothing";
    ChainDeep "chain-deep" Note,
        "none is lost; the first touch of a block asks many layers",
        "nothing";
    RegistryDamaged "registry-damaged" Risk,
        "none is lost; the other copy of the registry of children counts",
        "-p: it is written again from the other copy";
    RegistryLost "registry-lost" Risk,
        "none is lost; nothing tells which disks were made over it, so that no more can be, and it is not deleted",
        "-y: it is made again from the disks in its folder and below that name it as their parent";
    SealLost "seal-lost" Risk,
        "disks over it do not open; it could be written to, which would change what they show",
        "-y: the seal is taken from the CRCs behind its blocks, or from a disk in its folder that was made over it";
    LeakedSpace "leaked-space" Leak,
        "none is lost; space in the file belongs to no block",
        "-p: it is given back, in an image with superblocks";
    Tail "tail" Note,
        "none is lost; there is something between the last block and the footer",
        "nothing";
    Unreadable "unreadable" Corruption,
        "the medium refuses to read metadata; what it describes cannot be read, unless a copy tells the same: the check goes on with that",
        "nothing in place, since what is there cannot be saved first; --salvage puts what can be read, and what something else tells, into a new disk";
    DataDamaged "data-damaged" Corruption,
        "what a guest reads there is not what was sealed: the medium, or another program, has changed it",
        "nothing: put it back from a backup, or from the parent that is named if one still has it";
    BitmapDamaged "bitmap-damaged" Corruption,
        "which sectors the layer holds is not what was sealed: what it holds may be hidden, or show zeros",
        "nothing";
    CrcsDamaged "crcs-damaged" Risk,
        "none is lost; damage to the data would not be noticed",
        "nothing: `verify --seal` makes the page of CRCs again, from the data as it is now";
    CrcsMissing "crcs-missing" Note,
        "none is lost; damage to the data would not be noticed",
        "nothing: `verify --seal` makes the CRCs that are missing";
    StateDamaged "state-damaged" Corruption,
        "the VM cannot be resumed from this snapshot; the disk is not concerned",
        "nothing: put the file back from a backup";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
