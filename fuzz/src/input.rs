//! An input as a stream of small numbers. Behind its end come zeros, so that every input means something.

/// What is left of an input.
#[derive(Debug, Clone)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `count` bytes, or what is left of them.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn number(&mut self, bytes: usize) -> u64 {
        self.bytes(bytes).iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    /// The next byte.
    pub fn u8(&mut self) -> u8 {
        self.number(1) as u8
    }

    /// The next two bytes, the high one first.
    pub fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }

    /// The next eight bytes, the highest first.
    pub fn u64(&mut self) -> u64 {
        self.number(8)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        if end <= 256 { u64::from(self.u8()) % end } else { u64::from(self.u16()) % end }
    }
}
