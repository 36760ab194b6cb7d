//! Protocol Buffers' wire format, the part that a writer of ONNX files needs: a message is a run of
//! fields, each a key (number and wire type) and a value.

/// A message under construction.
#[derive(Default)]
pub(super) struct Message(Vec<u8>);

impl Message {
    pub fn new() -> Self {
        Self::default()
    }

    /// An integer, boolean or enumeration (wire type 0).
    pub fn int(mut self, field: u32, value: i64) -> Self {
        self.key(field, 0);
        // Negative values take ten bytes: two's complement, not zigzag.
        self.varint(value as u64);
        self
    }

    /// A float (wire type 5).
    pub fn float(mut self, field: u32, value: f32) -> Self {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Text or bytes (wire type 2).
    pub fn bytes(mut self, field: u32, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    /// A message within this one (wire type 2).
    pub fn message(self, field: u32, value: Message) -> Self {
        self.bytes(field, value.0)
    }

    /// The fields of `other` behind those of this one.
    pub fn append(mut self, other: Message) -> Self {
        self.0.extend(other.0);
        self
    }

    /// The same field once for every value.
    pub fn each<T>(self, values: impl IntoIterator<Item = T>, add: impl Fn(Self, T) -> Self) -> Self {
        values.into_iter().fold(self, add)
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn key(&mut self, field: u32, wire: u32) {
        self.varint(u64::from(field << 3 | wire));
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
pub(super) mod read {
    //! The other way, so that tests see what a reader would.

    /// A field's value.
    #[derive(Clone, Debug, PartialEq)]
    pub enum Value<'a> {
        Int(i64),
        Float(f32),
        Bytes(&'a [u8]),
    }

    /// The fields of a message, in order; panics on malformed bytes.
    pub fn fields(mut bytes: &[u8]) -> Vec<(u32, Value<'_>)> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let value = match key & 7 {
                0 => Value::Int(varint(&mut bytes) as i64),
                2 => {
                    let length = varint(&mut bytes) as usize;
                    Value::Bytes(take(&mut bytes, length))
                }
                5 => Value::Float(f32::from_le_bytes(take(&mut bytes, 4).try_into().unwrap())),
                other => panic!("wire type {other}"),
            };
            fields.push(((key >> 3) as u32, value));
        }
        fields
    }

    /// All bytes values of one field.
    pub fn all(bytes: &[u8], field: u32) -> Vec<&[u8]> {
        let of = |(number, value)| match value {
            Value::Bytes(b) if number == field => Some(b),
            _ => None,
        };
        fields(bytes).into_iter().filter_map(of).collect()
    }

    /// All integers of one field.
    pub fn ints(bytes: &[u8], field: u32) -> Vec<i64> {
        let of = |(number, value)| match value {
            Value::Int(i) if number == field => Some(i),
            _ => None,
        };
        fields(bytes).into_iter().filter_map(of).collect()
    }

    /// All texts of one field.
    pub fn texts(bytes: &[u8], field: u32) -> Vec<&str> {
        all(bytes, field).into_iter().map(|b| std::str::from_utf8(b).unwrap()).collect()
    }

    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = take(bytes, 1)[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return value;
            }
        }
        panic!("a varint of more than ten bytes")
    }

    fn take<'a>(bytes: &mut &'a [u8], n: usize) -> &'a [u8] {
        let (head, tail) = bytes.split_at(n);
        *bytes = tail;
        head
    }
}

#[cfg(test)]
mod tests {
    use super::read::{fields, Value};
    use super::Message;

    #[test]
    fn bytes_are_those_of_the_published_encoding() {
        // The examples of protobuf.dev/programming-guides/encoding.
        assert_eq!(Message::new().int(1, 150).into_bytes(), [0x08, 0x96, 0x01]);
        assert_eq!(Message::new().bytes(2, "testing").into_bytes(), *b"\x12\x07testing");
        let inner = Message::new().int(1, 150);
        assert_eq!(Message::new().message(3, inner).into_bytes(), [0x1a, 0x03, 0x08, 0x96, 0x01]);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let long = "x".repeat(300);
        let bytes = Message::new().int(20, -1).float(2, 1.5).bytes(9, &long).int(1, i64::MAX).into_bytes();
        let expected = [
            (20, Value::Int(-1)),
            (2, Value::Float(1.5)),
            (9, Value::Bytes(long.as_bytes())),
            (1, Value::Int(i64::MAX)),
        ];
        assert_eq!(fields(&bytes), expected);
    }
}
