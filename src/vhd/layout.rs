//! Compile-time proof that a structure in memory is laid out as the table of the format says.

/// Asserts, when compiling, the size of a structure and the offset of each of its fields, in bytes.
///
/// The fields must be all of them: the list is checked against a pattern that names every field.
macro_rules! assert_layout {
    ($structure:ident: $size:literal { $($field:ident @ $offset:literal),+ $(,)? }) => {
        const _: () = assert!(size_of::<$structure>() == $size);
        $(const _: () = assert!(core::mem::offset_of!($structure, $field) == $offset);)+
        const _: fn(&$structure) = |structure| {
            let $structure { $($field: _),+ } = structure;
        };
    };
}
