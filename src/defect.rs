//! Defects that can be switched on, one at a time, to prove that the simulator notices each (feature `defects`).
//!
//! The engine asks [`active`] at the places where a weaker rule would differ; without the feature the answer is a constant.
//! `docs/crash-safety.md` lists them with the rule each one breaks.

macro_rules! defects {
    ($($(#[doc = $doc:expr])+ $name:ident,)+; of threads: $($(#[doc = $doc_of:expr])+ $of_threads:ident,)+) => {
        /// A rule that is broken on purpose.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[cfg_attr(not(feature = "defects"), allow(dead_code, reason = "only seeded by the power test"))]
        pub enum Defect {
            $($(#[doc = $doc])+ $name,)+
            $($(#[doc = $doc_of])+ $of_threads,)+
        }

        impl Defect {
            /// All that one thread can show.
            #[cfg(feature = "defects")]
            pub const ALL: &[Defect] = &[$(Defect::$name,)+];

            /// All that only several threads can show, in some of their schedules.
            #[cfg(feature = "defects")]
            pub const OF_THREADS: &[Defect] = &[$(Defect::$of_threads,)+];

            /// What is broken.
            #[cfg(feature = "defects")]
            pub fn description(self) -> &'static str {
                match self {
                    $(Defect::$name => concat!($($doc),+).trim_ascii(),)+
                    $(Defect::$of_threads => concat!($($doc_of),+).trim_ascii(),)+
                }
            }
        }
    };
}

defects! {
    /// A full flush does not sync before its entry.
    FlushWithoutSync,
    /// A full flush writes its entry before it syncs.
    EntryBeforeData,
    /// The cut is taken after the sync, so that it names data that was not covered.
    CutAfterSync,
    /// One tail for maps and data: a flush forgets map records that are not in place.
    OneTail,
    /// The space of the ring follows the tails in memory, not the durable ones, and none of it is kept in reserve.
    SpaceByMemoryTails,
    /// A freed slot is reused at once.
    ReuseAtOnce,
    /// A freed slot is reused before the hole in it is durable.
    ReuseBeforePunchIsDurable,
    /// A freed slot is reused with its old content.
    ReuseWithoutPunch,
    /// Recovery leaves old content in free slots.
    RecoveryKeepsFreeSlots,
    /// Recovery leaves what lies behind the last block.
    RecoveryKeepsTail,
    /// Every session has the same id.
    SameSession,
    /// A full flush leaves its entry out while an old data record is live.
    OldDataStaysLive,
    /// Zeros are not journaled by a small flush.
    ZerosNotJournaled,
    /// A small flush journals data without its map change.
    DataBeforeMap,
    /// After a failed flush the data that it took is forgotten.
    FailedFlushForgetsData,
    /// Images hold the map as guests see it, not as the journal says.
    ImageFromMemory,
    /// Pages change in place without an image.
    CheckpointWithoutImages,
    /// A checkpoint moves the tails without a sync.
    CheckpointWithoutSync,
    /// Recovery changes pages in place without images.
    RecoveryWithoutImages,
    /// Recovery starts a session before what it wrote is synced.
    RecoveryWithoutSync,
    /// A failed write leaves its block in the map and its slot in the free list.
    FailedWriteStaysMapped,
    /// A failed write takes the slot away from the writes that ride on it.
    FailedWriteTakesSlot,
    /// A slot that a failed write has touched is reused as it is.
    SoiledSlotIsReused,
    /// Closing turns the cookie back before everything is in place.
    CloseCookieFirst,
    /// Closing turns the cookie back without a sync.
    CloseWithoutSync,
    /// Closing an image made elsewhere turns the cookie back before the block table that other programs read is durable.
    LeaveBeforeTable,
    /// A temporary journal is written before it is durable that the file was cut in front of the one before.
    JournalOverLeftover,
    /// The dirty cookie names a temporary journal that is not durable yet.
    MarkBeforeJournal,
    /// Of the first page of an image made elsewhere only footer and header come back.
    FirstPageNotKept,
    /// Recovery restores the headers of an image made elsewhere before the rest of the first page.
    HeadersBeforeFirstPage,
    /// An upgrade replaces the headers before the private area is durable.
    UpgradeWithoutSync,
    /// An upgrade leaves the parent locators where it wipes the file, until the new headers count.
    UpgradeKeepsLocators,
    /// The first page of an upgraded image may be written to while its temporary journal still ends the file.
    JournalOutlivesUpgrade,
    /// Entries count without a right CRC.
    EntryCrcUnchecked,
    /// A leaf that is sealed for a VM state gives its name away whether the state was committed or not.
    ExchangeWithoutManifest,
    /// Leaves sealed for a VM state give their names away before the state's manifest has its own.
    ExchangeBeforeManifest,
    /// The name of a VM state's manifest is not durable before the names of leaves and children are exchanged.
    ManifestNameNotDurable,
    /// A seal is taken away because its checkpoint was not committed, which another process can still do.
    UndecidedCheckpoint,
    /// The name of a manifest that only a cache may hold counts as the commit of a checkpoint.
    CommitFromCache,
    /// A disk commits a checkpoint in place of its leader while other disks' seals are not durable.
    CommitBeforeDurableSeals,
    /// The manifest of a VM state gets its name before it is synced.
    ManifestNotSynced,
    /// Parts of a VM state are made before the leaf notes that they are under way.
    StateNotNoted,
    /// The child of a snapshot that was not committed goes before the seal of its parent.
    UnlinkBeforeUnseal,
    /// The blobs of a VM state are not synced.
    BlobNotSynced,
    /// A write to a part of an absent unit of a differencing disk leaves zeros in the rest of it.
    NoCopyUp,
    /// The bits that a write to a differencing disk sets are not journaled.
    BitsNotJournaled,
    /// Bitmaps change in place without an image of their page.
    BitmapWithoutImage,
    /// A discarded block of a differencing disk is given back though its parent holds data there.
    DiscardShowsParent,
    /// Zeros are not written to an absent part of a differencing disk, whatever its parent holds there.
    ZerosDoNotHide,
    /// Another parent is named before its locators are durable.
    RepointBeforeLocators,
    /// Another parent is named in both copies of the headers at once.
    RepointCopiesAtOnce,
    /// Another parent is named without images of the headers.
    RepointWithoutImages,
    /// Another parent is named before what was copied up for it is durable.
    RepointWithoutFlush,
    /// A merge leaves out what lies behind a layer's end.
    MergeForgetsShortLayers,
    /// While layers are merged into a running disk, blocks that read as zeros over them are given back.
    MergeLetsBlocksGo,
    /// A merge copies up what a layer holds also where the disk has its own.
    MergeOverwrites,
    /// A merge shares a unit as it stands in a layer's file where that layer has but the first part of it.
    MergeSharesUnitsInPart,
    /// A disk that is to have no parent any more goes on taking blocks in parts.
    MergeTakesPartialBlocks,
    /// A layer that is written to in the middle of a chain shows what is beneath it past its own end.
    OpenLayerHasNoEnd,
    /// The child of a fixed disk's snapshot does not note that the snapshot is under way.
    FixedChildNotNoted,
    /// The child of a fixed disk's snapshot that was cut goes before the disk may be written to again.
    FixedChildGoesFirst,
    /// A fixed disk that is a snapshot may be written to.
    FixedStaysWritable,
    /// Opening an image does not make its name durable.
    NameNotDurable,
    /// Without an exchange of names, the child's new name is not durable before the leaf takes its old one.
    ChildNotAside,
    /// Without an exchange of names, the leaf's second name is not durable before the child takes the first.
    RenameBeforeLink,
    /// The names are exchanged before the leaf is sealed.
    CommitBeforeSeal,
    /// A sealing that was cut is finished though the seal was in a cache alone.
    SealFromCache,
    /// The allocator hands out a slot that is in use.
    LiveSlotIsHandedOut,
    /// A write of the guest goes to a block's page.
    GuestWritesToMetadata,
    /// A cookie that was turned back over a journal is believed.
    TurnedBackCookieCounts,
    /// A journal under a cookie that was turned back is replayed over what another program has written since.
    ReplayOverOthers,
    ;
    of threads:
    /// A freed slot is punched although somebody still uses it.
    PinsIgnored,
    /// Whoever pinned a slot does not look whether the block is still there.
    PinWithoutSecondLook,
    /// Whoever pinned a slot goes by what the map said before.
    FirstLookCounts,
    /// Whoever takes a slot for an absent block does not look whether it is still absent.
    RideWithoutSecondLook,
    /// A write that rode on one allocation of a block completes the next one.
    CommitToNextAllocation,
    /// Several writers bring one absent unit of a differencing disk.
    UnitsWithoutOwner,
    /// The cut of a flush may have a map change without the data it exposes.
    CutBetweenMapAndData,
    /// A small flush journals data while it is being written.
    JournaledWhileWritten,
    /// Pieces of data are joined where they touch in a slot, even if one is of a block that has left it.
    ExtentsJoinedBySlot,
    /// A small flush leaves out data of a block that was freed after its cut.
    FreedDataIsNotFlushed,
    /// A flush that waited for one that failed succeeds.
    FailedFlushCounts,
    /// A flush shares the one that was under way when it was called.
    FlushJoinsRunning,
    /// A close does not wait for what is under way.
    CloseDoesNotWait,
    /// A new leaf comes in while changes of some threads go on in the old one.
    ChangesInTwoLeaves,
    /// A read holds the lock under which the next leaf is put in, and so stops all changes until it is done.
    ReadLockNotRechecked,
    /// A flush is answered for a leaf that has no durable place in the chain yet.
    FlushOfNamelessLeaf,
}

/// Whether a defect is switched on, on this thread.
#[cfg(feature = "defects")]
pub(crate) fn active(defect: Defect) -> bool {
    ACTIVE.with(|active| active.get() == Some(defect))
}

/// Whether any defect is switched on, on this thread.
#[cfg(feature = "defects")]
pub(crate) fn any() -> bool {
    ACTIVE.with(|active| active.get().is_some())
}

/// No defects without the feature.
#[cfg(not(feature = "defects"))]
pub(crate) const fn any() -> bool {
    false
}

/// No defects without the feature.
#[cfg(not(feature = "defects"))]
pub(crate) const fn active(_: Defect) -> bool {
    false
}

#[cfg(feature = "defects")]
thread_local! {
    static ACTIVE: std::cell::Cell<Option<Defect>> = const { std::cell::Cell::new(None) };
}

/// Switches a defect on, on this thread, instead of the one before.
#[cfg(feature = "defects")]
pub fn seed(defect: Option<Defect>) {
    ACTIVE.with(|active| active.set(defect));
}
