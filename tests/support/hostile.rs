//! Images that are broken, or made to do harm, built by code: each with what a check must find and what a repair can do.
//!
//! docs/check.md has them as a table.

#[path = "images.rs"]
pub mod images;

use cowvhd::check::Code;
use cowvhd::vhd::{DiskType, DynamicHeader, Footer, ParentLocator, PlatformCode, Timestamp, UniqueId};
use cowvhd::{CreateOptions, OpenOptions};
use images::{
    BLOCK, FIRST_BLOCK, MIB, OUR_TABLE, RING, SIZE, STRIDE, TABLE, add_block, append_block, foreign,
    foreign_of, length, ours, ours_dirty, ours_reopened, patch, patch_entry, patch_footers, patch_header,
    patch_superblock, places, read, set_length, write,
};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What a repair can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is wrong: the file is not touched.
    Sound,
    /// `repair -p` mends it.
    Preened,
    /// `repair -y` mends it.
    Repaired,
    /// Nothing tells how to mend it: the file is not touched.
    Refused,
}
use Outcome::{Preened, Refused, Repaired, Sound};

/// One image.
pub struct Case {
    /// What is wrong with it, as in docs/check.md.
    pub name: &'static str,
    pub build: Box<dyn Fn(&Path)>,
    /// What a check finds, among other things perhaps; nothing at all if `None`.
    pub code: Option<Code>,
    pub outcome: Outcome,
}

fn case(
    name: &'static str,
    code: impl Into<Option<Code>>,
    outcome: Outcome,
    build: impl Fn(&Path) + 'static,
) -> Case {
    Case { name, build: Box::new(build), code: code.into(), outcome }
}

/// All images.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(headers());
    cases.extend(tables());
    cases.extend(footers());
    cases.extend(files());
    cases.extend(bitmaps());
    cases.extend(locators());
    cases.extend(superblocks());
    cases.extend(journals());
    cases
}

fn headers() -> Vec<Case> {
    let block_size = |size: u32| {
        move |path: &Path| {
            foreign(path);
            patch_header(path, 32, &size.to_be_bytes());
        }
    };
    let entries = |count: u32| {
        move |path: &Path| {
            foreign(path);
            patch_header(path, 28, &count.to_be_bytes());
        }
    };
    let table = |at: u64| {
        move |path: &Path| {
            foreign(path);
            patch_header(path, 16, &at.to_be_bytes());
        }
    };
    let data = |at: u64| {
        move |path: &Path| {
            foreign(path);
            patch_footers(path, 16, &at.to_be_bytes());
        }
    };
    let next = |at: u64| {
        move |path: &Path| {
            foreign(path);
            patch_header(path, 8, &at.to_be_bytes());
        }
    };
    vec![
        case("block size 0", Code::HeadersLost, Refused, block_size(0)),
        case("block size 1", Code::HeadersLost, Refused, block_size(1)),
        case("block size 511", Code::HeadersLost, Refused, block_size(511)),
        case("block size 3 MiB", Code::HeadersLost, Refused, block_size(3 << 20)),
        case("block size 2^31", Code::HeadersLost, Refused, block_size(1 << 31)),
        case("block size 2^32 - 1", Code::HeadersLost, Refused, block_size(u32::MAX)),
        case("0 table entries", Code::HeadersLost, Refused, entries(0)),
        case("0x40000001 table entries", Code::LayoutWrong, Refused, entries(0x4000_0001)),
        case("2^32 - 1 table entries", Code::LayoutWrong, Refused, entries(u32::MAX)),
        case("fewer table entries than blocks", Code::HeadersLost, Refused, entries(7)),
        case("more table entries than blocks", Code::ExtraEntries, Sound, entries(9)),
        case("table at 0", Code::HeadersLost, Refused, table(0)),
        case("table over the header", Code::HeadersLost, Refused, table(1024)),
        case("table at an odd place", Code::HeadersLost, Refused, table(1537)),
        case("table past the end", Code::LayoutWrong, Refused, table(1 << 30)),
        case("table above 2^63", Code::HeadersLost, Refused, table((1 << 63) + 512)),
        case("header named at the footer itself", Code::HeadersLost, Repaired, data(0)),
        case("header named past the end", Code::HeadersLost, Repaired, data(1 << 40)),
        case("header named at 2^32 - 1", Code::HeadersLost, Repaired, data(0xffff_ffff)),
        case("header named at all ones", Code::HeadersLost, Repaired, data(u64::MAX)),
        // What the header itself could name further on is not used by anybody.
        case("a next structure at the header itself, a loop", None, Sound, next(512)),
        case("a next structure at 2^32 - 1", None, Sound, next(0xffff_ffff)),
        case("a next structure past the end", None, Sound, next(1 << 40)),
        case("wrong checksum of the header", Code::HeadersLost, Refused, |path| {
            foreign(path);
            write(path, &[1], 1000);
        }),
        case("wrong checksum of the header, ours", Code::FrontDamaged, Preened, |path| {
            ours(path);
            write(path, &[1], 1000);
        }),
    ]
}

fn tables() -> Vec<Case> {
    let entry = |value: u32| {
        move |path: &Path| {
            foreign(path);
            write(path, &value.to_be_bytes(), TABLE + 5 * 4);
        }
    };
    let first = (FIRST_BLOCK / 512) as u32;
    let ours_entry = |value: u32| {
        move |path: &Path| {
            ours(path);
            write(path, &value.to_be_bytes(), OUR_TABLE + 5 * 4);
        }
    };
    vec![
        case("entry 0", Code::BatMetadata, Refused, entry(0)),
        case("entry 1", Code::BatMetadata, Repaired, entry(1)),
        case("entry 2", Code::BatMetadata, Repaired, entry(2)),
        case("entry 3, the table itself", Code::BatMetadata, Repaired, entry(3)),
        case("entry used twice", Code::BatOverlap, Repaired, entry(first)),
        case("entry used three times", Code::BatOverlap, Repaired, move |path| {
            foreign(path);
            write(path, &first.to_be_bytes().repeat(2), TABLE + 5 * 4);
        }),
        case("an entry past the end, and one used twice", Code::BatOverlap, Repaired, move |path| {
            foreign(path);
            for (block, entry) in [(5, first), (6, 1 << 20)] {
                write(path, &entry.to_be_bytes(), TABLE + block * 4);
            }
        }),
        case("entry one sector into a block", Code::BatOverlap, Repaired, entry(first + 1)),
        case("entry one sector before the end of a block", Code::BatOverlap, Repaired, entry(first + 128)),
        case("entry past the end", Code::BatRange, Repaired, entry(1 << 20)),
        case("entry 0xFFFFFFFE", Code::BatRange, Repaired, entry(0xffff_fffe)),
        case("entry in the private area", Code::BatDamaged, Preened, ours_entry(1000)),
        case("entry used twice, ours", Code::BatDamaged, Preened, ours_entry((7 * MIB + 3584) as u32 / 512)),
        case("entry past the end, ours", Code::BatDamaged, Preened, ours_entry(0xffff_fffe)),
        case("an entry past the end, and one that was lost beside it", Code::BatRange, Repaired, |path| {
            ours(path);
            // Of another program, so that no table is proven.
            append_block(path, 5);
            write(path, &0xffff_fffe_u32.to_be_bytes(), OUR_TABLE + 6 * 4);
            write(path, &[0xff; 4], OUR_TABLE);
        }),
        case(
            "an entry one sector into a block of ours, and another program's block",
            Code::BatOverlap,
            Repaired,
            |path| {
                ours(path);
                append_block(path, 5);
                write(path, &((7 * MIB + 4096) as u32 / 512).to_be_bytes(), OUR_TABLE + 6 * 4);
            },
        ),
        case("entries behind the end of the disk", Code::BatBeyondDisk, Repaired, |path| {
            ours(path);
            for at in [0, 12288, length(path) - 512] {
                patch::<512>(path, at, 48, &(6 * MIB).to_be_bytes(), 64);
            }
        }),
        case("a sparse table of 4 GiB of zeros", Code::BatMetadata, Refused, |path| {
            let footer =
                Footer::new(DiskType::Dynamic, 512 << 30, UniqueId::from_bytes([3; 16]), Timestamp(1));
            let header = DynamicHeader::new(TABLE, 1 << 30, 512);
            let file = File::create(path).unwrap();
            let end = TABLE + (4 << 30);
            for (bytes, at) in
                [(&footer.to_bytes()[..], 0), (&header.to_bytes(), 512), (&footer.to_bytes(), end)]
            {
                file.write_all_at(bytes, at).unwrap();
            }
        }),
    ]
}

fn footers() -> Vec<Case> {
    let geometry = |bytes: [u8; 4]| {
        move |path: &Path| {
            foreign(path);
            patch_footers(path, 56, &bytes);
        }
    };
    let size = |size: u64| {
        move |path: &Path| {
            foreign(path);
            patch_footers(path, 48, &size.to_be_bytes());
        }
    };
    let disk_type = |kind: u32| {
        move |path: &Path| {
            foreign(path);
            patch_footers(path, 60, &kind.to_be_bytes());
        }
    };
    vec![
        case("geometry 0/0/0", Code::Geometry, Sound, geometry([0; 4])),
        case("geometry 65535/255/255", Code::Geometry, Sound, geometry([0xff; 4])),
        case("geometry below the size", Code::Geometry, Sound, geometry([0, 1, 4, 17])),
        case("size 0", Code::HeadersLost, Refused, size(0)),
        case("size not a multiple of 512", Code::HeadersLost, Refused, size(SIZE - 1)),
        case("size above 2040 GiB", Code::HeadersLost, Refused, size((2040 << 30) + 512)),
        case("size 2^64 - 1", Code::HeadersLost, Refused, size(u64::MAX)),
        case("disk type 0", Code::HeadersLost, Refused, disk_type(0)),
        case("disk type 1", Code::HeadersLost, Refused, disk_type(1)),
        case("disk type 5", Code::HeadersLost, Refused, disk_type(5)),
        case("disk type 6", Code::HeadersLost, Refused, disk_type(6)),
        case("saved state 1", Code::SavedState, Sound, |path| {
            foreign(path);
            patch_footers(path, 84, &[1]);
        }),
        case("reserved bytes of the footer", Code::ReservedBytes, Sound, |path| {
            foreign(path);
            patch_footers(path, 85, &[1]);
        }),
        case("reserved bytes of the header", Code::ReservedBytes, Sound, |path| {
            foreign(path);
            patch_header(path, 60, &[1]);
        }),
        case("a backup of something else", Code::BackupOutdated, Sound, |path| {
            ours(path);
            patch::<512>(path, 12288, 28, b"else", 64);
        }),
        case("footers that disagree, each with a right checksum", Code::FootersDiffer, Repaired, |path| {
            foreign(path);
            patch::<512>(path, length(path) - 512, 48, &(SIZE - 512).to_be_bytes(), 64);
        }),
        case("the copy at the start does not fit the file", Code::FootersDiffer, Repaired, |path| {
            foreign(path);
            patch::<512>(path, 0, 48, &(1_u64 << 40).to_be_bytes(), 64);
        }),
        case("wrong checksum of the footer", Code::FooterDamaged, Preened, |path| {
            foreign(path);
            write(path, &[1], length(path) - 100);
        }),
        case("wrong checksum of the footer, ours", Code::FooterDamaged, Preened, |path| {
            ours(path);
            write(path, &[1], length(path) - 100);
        }),
        case("wrong checksum of the footer copy", Code::FrontDamaged, Preened, |path| {
            foreign(path);
            write(path, &[1], 400);
        }),
        case("both footers damaged", Code::HeadersLost, Refused, |path| {
            foreign(path);
            write(path, &[1], 400);
            write(path, &[1], length(path) - 100);
        }),
        case("a footer of 511 bytes, and the copy damaged", Code::HeadersLost, Repaired, |path| {
            foreign(path);
            write(path, &[1], 400);
            set_length(path, length(path) - 1);
        }),
        case("both headers damaged, ours", Code::HeadersLost, Repaired, |path| {
            ours(path);
            [1000, 12288 + 1000].iter().for_each(|&at| write(path, &[1], at));
        }),
        case("both headers damaged, not closed", Code::HeadersLost, Repaired, |path| {
            ours_dirty(path);
            [1000, 12288 + 1000].iter().for_each(|&at| write(path, &[1], at));
        }),
        case(
            "both headers damaged, and a footer copy of another disk",
            Code::HeadersLost,
            Repaired,
            |path| {
                ours(path);
                [1000, 12288 + 1000].iter().for_each(|&at| write(path, &[1], at));
                patch::<512>(path, 0, 68, &[0x33; 16], 64);
            },
        ),
        case("start, footer of the backup and superblocks damaged", Code::HeadersLost, Repaired, |path| {
            ours(path);
            write(path, &[0; 12288], 0);
            write(path, &[1], 12288 + 400);
        }),
        case("a damaged start, and a backup of something else", Code::FrontDamaged, Repaired, |path| {
            ours(path);
            write(path, &[1], 1000);
            patch::<512>(path, 12288, 28, b"else", 64);
            patch::<512>(path, length(path) - 512, 28, b"else", 64);
        }),
        case("footer of 511 bytes", Code::FooterShort, Sound, |path| {
            foreign(path);
            set_length(path, length(path) - 1);
        }),
    ]
}

fn files() -> Vec<Case> {
    let fixed = |path: &Path| CreateOptions::new(MIB).fixed().create(path).unwrap();
    vec![
        case("an empty file", Code::HeadersLost, Refused, |path| drop(File::create(path).unwrap())),
        case("a file of 511 bytes", Code::HeadersLost, Refused, |path| fs::write(path, [1; 511]).unwrap()),
        case("a sparse file of 2 TiB", Code::HeadersLost, Refused, |path| {
            File::create(path).unwrap().set_len(2 << 40).unwrap();
        }),
        case("a fixed disk with a VHD of the guest at its start", None, Sound, move |path| {
            let inner = path.with_extension("inner");
            foreign(&inner);
            fixed(path);
            write(path, &fs::read(&inner).unwrap(), 0);
        }),
        case("a fixed disk that names a header in its first block", None, Sound, move |path| {
            fixed(path);
            patch::<512>(path, length(path) - 512, 16, &512_u64.to_be_bytes(), 64);
        }),
        case("a fixed disk that names a header at 2^32 - 1", None, Sound, move |path| {
            fixed(path);
            patch::<512>(path, length(path) - 512, 16, &0xffff_ffff_u64.to_be_bytes(), 64);
        }),
        case("a fixed disk with a footer of 511 bytes", Code::FooterShort, Sound, move |path| {
            fixed(path);
            set_length(path, length(path) - 1);
        }),
        case("a fixed disk with junk behind its footer", Code::HeadersLost, Refused, move |path| {
            fixed(path);
            write(path, &[5; 700], length(path));
        }),
        case("a fixed disk that was cut", Code::HeadersLost, Refused, move |path| {
            fixed(path);
            set_length(path, length(path) - 4096);
        }),
        case("junk behind the footer", Code::FooterDamaged, Preened, |path| {
            foreign(path);
            write(path, &[5; 700], length(path));
        }),
        case("junk between the last block and the footer", Code::Tail, Sound, |path| {
            foreign(path);
            let footer: [u8; 512] = read(path, 0);
            write(path, &[5; 1024], length(path) - 512);
            write(path, &footer, length(path));
        }),
        case("blocks out of order", None, Sound, foreign),
        case("a table right behind the blocks", None, Sound, |path| {
            foreign(path);
            let (table, at) = (read::<512>(path, TABLE), FIRST_BLOCK + 3 * STRIDE);
            let footer: [u8; 512] = read(path, 0);
            write(path, &table, at);
            write(path, &footer, at + 512);
            patch_header(path, 16, &at.to_be_bytes());
        }),
        case("no blocks at all", None, Sound, |path| {
            foreign(path);
            let footer: [u8; 512] = read(path, 0);
            write(path, &[0xff; 32], TABLE);
            write(path, &footer, TABLE + 512);
            set_length(path, TABLE + 1024);
        }),
        case("blocks in front of all others that nobody names", None, Sound, |path| {
            foreign(path);
            write(path, &[0xff; 8], TABLE);
        }),
        case("a hole between two blocks", None, Sound, |path| {
            foreign(path);
            let at = FIRST_BLOCK + 5 * STRIDE;
            let footer = read::<512>(path, 0);
            set_length(path, FIRST_BLOCK + 2 * STRIDE);
            write(path, &[0xff; 512], at);
            write(path, &vec![4; BLOCK as usize], at + 512);
            write(path, &((at / 512) as u32).to_be_bytes(), TABLE + 3 * 4);
            write(path, &footer, at + STRIDE);
        }),
        case("some sectors between two blocks", None, Sound, |path| {
            foreign(path);
            let at = FIRST_BLOCK + 2 * STRIDE + 3 * 512;
            let footer = read::<512>(path, 0);
            write(path, &[0xaa; 3 * 512], FIRST_BLOCK + 2 * STRIDE);
            write(path, &[0xff; 512], at);
            write(path, &vec![4; BLOCK as usize], at + 512);
            write(path, &((at / 512) as u32).to_be_bytes(), TABLE + 3 * 4);
            write(path, &footer, at + STRIDE);
        }),
        case("a block that nobody names", Code::LeakedSpace, Sound, |path| {
            foreign(path);
            write(path, &[0xff; 4], TABLE);
        }),
    ]
}

fn bitmaps() -> Vec<Case> {
    vec![
        case("a bitmap cut by the end of the file", Code::BatRange, Repaired, |path| {
            foreign(path);
            set_length(path, FIRST_BLOCK + 2 * STRIDE + 256);
        }),
        case("a block cut by the end of the file", Code::BatRange, Repaired, |path| {
            foreign(path);
            set_length(path, FIRST_BLOCK + 2 * STRIDE + 10_000);
        }),
        case("a block of ours cut by the end of the file", Code::BatRange, Repaired, |path| {
            ours(path);
            set_length(path, length(path) - 512 - 2 * MIB + 8192);
        }),
        case("a block cut behind its bitmap", Code::BatRange, Repaired, |path| {
            foreign(path);
            set_length(path, FIRST_BLOCK + 2 * STRIDE + 512);
        }),
        case(
            "a block cut by the end of the file, and an entry past that",
            Code::BatRange,
            Repaired,
            |path| {
                foreign(path);
                set_length(path, FIRST_BLOCK + 2 * STRIDE + 10_000);
                write(path, &(1_u32 << 20).to_be_bytes(), TABLE + 5 * 4);
            },
        ),
        case("a block cut by the end of the file, and an entry into it", Code::BatRange, Repaired, |path| {
            foreign(path);
            set_length(path, FIRST_BLOCK + 2 * STRIDE + 10_000);
            write(path, &((FIRST_BLOCK + 2 * STRIDE + 512) as u32 / 512).to_be_bytes(), TABLE + 5 * 4);
        }),
        case("a bitmap of zeros over data", Code::BitmapHidden, Refused, |path| {
            foreign(path);
            write(path, &[0; 512], FIRST_BLOCK);
        }),
        case("a bitmap of zeros over data, ours", Code::BitmapClear, Preened, |path| {
            ours(path);
            write(path, &[0; 512], 7 * MIB + 3584);
        }),
        case("bits for sectors behind the end of the disk", Code::BitmapPastEnd, Sound, |path| {
            foreign(path);
            patch_footers(path, 48, &(3 * BLOCK + 512_u64).to_be_bytes());
            write(path, &[0x80, 0x01], FIRST_BLOCK + 2 * STRIDE);
            write(path, &[0; 14], FIRST_BLOCK + 2 * STRIDE + 2);
            // The last bit that there is room for.
            write(path, &[0x01], FIRST_BLOCK + 2 * STRIDE + 511);
            write(path, &vec![0; BLOCK as usize - 512], FIRST_BLOCK + 2 * STRIDE + 1024);
        }),
        case("wrong CRC of a block header", Code::BlockHeader, Preened, |path| {
            ours(path);
            write(path, &[9], 7 * MIB + 40);
        }),
        case("a differencing disk of which all bits are set", Code::BitmapsAllSet, Sound, |path| {
            foreign_of(path, DiskType::Differencing, &[]);
        }),
    ]
}

/// What is wrong with how a differencing disk names its parent, `base.vhd` of id 9 (sixteen times) beside it.
pub fn locators() -> Vec<Case> {
    let text = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let build = |locators: Vec<(ParentLocator, Vec<u8>)>| {
        move |path: &Path| foreign_of(path, DiskType::Differencing, &locators)
    };
    let good = text(r".\base.vhd");
    let at = |platform, place| ParentLocator::new(platform, place, 512, 20);
    let w2ru = at(PlatformCode::W2ru, 4096);
    let one = |locator: ParentLocator, payload: &[u8]| build(vec![(locator, payload.to_vec())]);
    let eight = (0..8).map(|i| (at(PlatformCode::W2ru, 3072 + i * 512), good.clone())).collect();
    let surrogate: Vec<u8> = [0xd800_u16, 0x41].iter().flat_map(|unit| unit.to_le_bytes()).collect();
    vec![
        case("a locator with a huge data space", Code::Locator, Refused, {
            one(ParentLocator { data_space: 0xffff_fe00, data_length: 0xffff_fe00, ..w2ru }, &good)
        }),
        case(
            "a locator without data space",
            Code::Locator,
            Refused,
            one(ParentLocator { data_space: 0, ..w2ru }, &good),
        ),
        case("a locator over the table", Code::Locator, Refused, one(at(PlatformCode::W2ru, TABLE), &good)),
        case(
            "a locator over a block",
            Code::Locator,
            Refused,
            one(at(PlatformCode::W2ru, FIRST_BLOCK + 512), &good),
        ),
        case("a locator over the last sector of a block", Code::Locator, Refused, {
            one(at(PlatformCode::W2ru, FIRST_BLOCK + STRIDE - 512), &good)
        }),
        case("a locator past the end", Code::Locator, Refused, one(at(PlatformCode::W2ru, 1 << 40), &good)),
        case("eight locators of one kind", None, Sound, build(eight)),
        case("locators in reverse, one right behind the other", None, Sound, {
            build(vec![
                (at(PlatformCode::W2ru, 3072), good.clone()),
                (at(PlatformCode::W2ku, 2560), good.clone()),
            ])
        }),
        case("a locator in a notation that nobody reads", None, Sound, {
            build(vec![(w2ru, good.clone()), (at(PlatformCode::Wi2r, 5120), vec![0xff; 20])])
        }),
        case("W2ku and W2ru that disagree", Code::LocatorsDisagree, Sound, {
            build(vec![(w2ru, good.clone()), (at(PlatformCode::W2ku, 5120), text(r"C:\other.x"))])
        }),
        case("unpaired surrogates", None, Sound, one(ParentLocator { data_length: 4, ..w2ru }, &surrogate)),
        case(
            "an odd number of bytes",
            Code::Locator,
            Refused,
            one(ParentLocator { data_length: 19, ..w2ru }, &good),
        ),
        case("a URL of another scheme", Code::Locator, Refused, {
            one(ParentLocator { data_length: 16, ..at(PlatformCode::MacX, 4096) }, b"http://host/base")
        }),
        case("no parent id", Code::ParentId, Refused, |path| {
            foreign_of(path, DiskType::Differencing, &[]);
            patch_header(path, 40, &[0; 16]);
        }),
    ]
}

fn superblocks() -> Vec<Case> {
    let both = |field: usize, bytes: &'static [u8]| {
        move |path: &Path| {
            ours(path);
            patch_superblock(path, 4096, field, bytes);
            patch_superblock(path, 8192, field, bytes);
        }
    };
    vec![
        case("both superblocks bad", Code::SuperblocksLost, Repaired, |path| {
            ours(path);
            write(path, &[1], 4096);
            write(path, &[1], 8192);
        }),
        case("one superblock bad", Code::SuperblockDamaged, Preened, |path| {
            ours(path);
            write(path, &[1], 8192);
        }),
        case(
            "superblocks of one sequence",
            Code::SuperblockSequence,
            Preened,
            both(8, &[0, 0, 0, 0, 0, 0, 0, 9]),
        ),
        case("one superblock of another disk", Code::SuperblockDamaged, Preened, |path| {
            ours(path);
            patch_superblock(path, 4096, 16, &[0x77; 16]);
        }),
        case("both superblocks of another disk", Code::SuperblocksLost, Repaired, both(16, &[0x77; 16])),
        case("a disk with a new unique id", Code::SuperblockOther, Sound, |path| {
            ours(path);
            patch_footers(path, 68, &[0x33; 16]);
        }),
        case(
            "a slot origin inside the table",
            Code::LayoutWrong,
            Refused,
            both(136, &[0, 0, 0, 0, 0, 0x30, 0, 0]),
        ),
        case("a ring of 2^63 bytes", Code::LayoutWrong, Refused, both(88, &[0x80, 0, 0, 0, 0, 0, 0, 0])),
        case("the mark of a failed sync", Code::SyncFailed, Repaired, both(60, &[0, 0, 0, 1])),
        case(
            "an allocation above the superblock's count",
            Code::AllocationSequence,
            Preened,
            both(128, &[0, 0, 0, 0, 0, 0, 0, 2]),
        ),
        case(
            "both superblocks lost, and the page of a block of zeros",
            Code::SuperblocksLost,
            Repaired,
            |path| {
                ours(path);
                let disk = OpenOptions::new().open(path).unwrap();
                disk.write_at(&vec![0; 8192], 5 * 2 * MIB).unwrap();
                disk.close().unwrap();
                write(path, &[0; 8192], 4096);
                write(path, &[0; 4096], 7 * MIB + 3 * (2 * MIB + 4096));
            },
        ),
        case("both superblocks lost, and another program's block", Code::SuperblocksLost, Repaired, |path| {
            ours(path);
            append_block(path, 2);
            write(path, &[0; 8192], 4096);
        }),
        case("both superblocks lost, and the header elsewhere", Code::SuperblocksLost, Refused, |path| {
            ours(path);
            let header: [u8; 1024] = read(path, 512);
            write(path, &[0; 8192], 4096);
            write(path, &header, 2048);
            patch_footers(path, 16, &2048_u64.to_be_bytes());
        }),
        case("both superblocks lost, and blocks of 32 MiB", Code::SuperblocksLost, Refused, |path| {
            ours(path);
            write(path, &[0; 8192], 4096);
            for header in [512, 12288 + 512] {
                patch::<1024>(path, header, 32, &(32_u32 << 20).to_be_bytes(), 36);
            }
            write(path, &[0xff; 32], OUR_TABLE);
        }),
        case("a bitmap of zeros in a file that was not closed", Code::BitmapClear, Preened, |path| {
            ours_reopened(path);
            write(path, &[0; 512], 7 * MIB + 3584);
        }),
        // What was allocated since the last close no table proves.
        case("a block page lost in a file that was not closed", Code::BlockHeader, Repaired, |path| {
            ours_reopened(path);
            write(path, &[0; 4096], 7 * MIB);
        }),
        case("superblocks lost in a file that was not closed", Code::JournalLost, Repaired, |path| {
            ours_dirty(path);
            write(path, &[0; 8192], 4096);
        }),
    ]
}

fn journals() -> Vec<Case> {
    let newest = |change: fn(&mut [u8])| {
        move |path: &Path| {
            ours_dirty(path);
            patch_entry(path, *places(path).last().unwrap(), change);
        }
    };
    let image_at = |offset: u64| {
        move |path: &Path| {
            ours_dirty(path);
            let place = *places(path).last().unwrap();
            patch_entry(path, place, |entry| {
                entry[96..100].copy_from_slice(&[0, 6, 0, 0]);
                entry[100..104].copy_from_slice(&(32_u32 + 4096).to_be_bytes());
                entry[104..112].copy_from_slice(&offset.to_be_bytes());
                entry[124..128].copy_from_slice(&8_u32.to_be_bytes());
                entry[80..84].copy_from_slice(&(32_u32 + 4096).to_be_bytes());
            });
        }
    };
    vec![
        case("a journal to be replayed", Code::NotClosed, Preened, ours_dirty),
        case("a journal entry with a wrong CRC", Code::JournalDamaged, Repaired, |path| {
            ours_dirty(path);
            write(path, &[9], RING + places(path)[1] + 200);
        }),
        case("a journal with a gap behind a block with clear bits", Code::JournalDamaged, Repaired, |path| {
            ours_dirty(path);
            let places = places(path);
            patch_entry(path, places[0], |entry| entry[98..100].fill(0));
            write(path, &[9], RING + places[1] + 200);
        }),
        case("the newest journal entry cut", Code::NotClosed, Preened, |path| {
            ours_dirty(path);
            write(path, &[0; 4096], RING + places(path).last().unwrap());
        }),
        case("journal tails behind the newest entry", Code::JournalDamaged, Repaired, {
            newest(|entry| {
                entry[48..56].fill(0xff);
                entry[64..72].fill(0xff);
            })
        }),
        case(
            "a journal sequence of 2^64 - 1",
            Code::JournalDamaged,
            Repaired,
            newest(|entry| entry[32..40].fill(0xff)),
        ),
        case("a journal record longer than its entry", Code::JournalDamaged, Repaired, {
            newest(|entry| entry[100..104].fill(0xff))
        }),
        case("a journal image aimed at guest data", Code::JournalDamaged, Repaired, image_at(7 * MIB + 4096)),
        case(
            "a journal image aimed behind all slots",
            Code::JournalDamaged,
            Repaired,
            image_at(7 * MIB + ((2 * MIB + 4096) << 40)),
        ),
        case("a journal image aimed at a superblock", Code::JournalDamaged, Repaired, image_at(4096)),
        case("a journal of another session", Code::NotClosed, Preened, |path| {
            ours_dirty(path);
            for place in places(path) {
                patch_entry(path, place, |entry| entry[16..32].fill(0x44));
            }
        }),
        case("a dirty cookie turned back by hand", Code::JournalNotReplayed, Repaired, |path| {
            ours_dirty(path);
            patch_header(path, 0, b"cxsparse");
        }),
        case(
            "a cookie turned back, and a block added behind the table",
            Code::JournalNotReplayed,
            Repaired,
            |path| {
                ours_dirty(path);
                patch_header(path, 0, b"cxsparse");
                add_block(path, 2, OUR_TABLE + 512);
            },
        ),
        case(
            "a cookie turned back, and a block added over the journal's",
            Code::JournalNotReplayed,
            Refused,
            |path| {
                ours_dirty(path);
                patch_header(path, 0, b"cxsparse");
                add_block(path, 2, OUR_TABLE + 4 * MIB);
            },
        ),
        case(
            "a cookie turned back, and another place for a block of the journal",
            Code::JournalNotReplayed,
            Refused,
            |path| {
                ours_dirty(path);
                patch_header(path, 0, b"cxsparse");
                add_block(path, 3, OUR_TABLE + 512);
            },
        ),
        case("a cookie turned back, and footers that differ", Code::JournalNotReplayed, Refused, |path| {
            ours_dirty(path);
            patch_header(path, 0, b"cxsparse");
            let (footer, end) = (read::<512>(path, 0), length(path));
            write(path, &footer, end);
            patch::<512>(path, end, 24, &[1; 4], 64);
        }),
        case("a cookie turned back in an image made elsewhere", Code::JournalNotReplayed, Repaired, |path| {
            foreign(path);
            let disk = OpenOptions::new().open(path).unwrap();
            disk.write_at(&vec![5; BLOCK as usize], 2 * BLOCK).unwrap();
            disk.flush().unwrap();
            drop(disk);
            patch_header(path, 0, b"cxsparse\xff\xff\xff\xff\xff\xff\xff\xff");
        }),
    ]
}
