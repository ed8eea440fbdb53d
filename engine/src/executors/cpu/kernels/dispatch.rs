//! From values to constants: one instance of a product for each kind of codes and number of rows.

/// Calls `$f::<W, $more...>` with the number of rows, 1 to 8, as a constant.
macro_rules! by_width {
    ($width:expr, $f:ident[$($more:expr),*]($($arg:expr),*)) => {
        match $width {
            1 => $f::<1 $(, { $more })*>($($arg),*),
            2 => $f::<2 $(, { $more })*>($($arg),*),
            3 => $f::<3 $(, { $more })*>($($arg),*),
            4 => $f::<4 $(, { $more })*>($($arg),*),
            5 => $f::<5 $(, { $more })*>($($arg),*),
            6 => $f::<6 $(, { $more })*>($($arg),*),
            7 => $f::<7 $(, { $more })*>($($arg),*),
            _ => $f::<8 $(, { $more })*>($($arg),*),
        }
    };
}

/// Calls `$f::<W, NIBBLES, SCALES, $more...>`, where `SCALES` is the kind of scales as a number; `$by`: the macro that
/// makes `W` of the number of rows.
macro_rules! by_codes {
    ($codes:expr, $width:expr, $f:ident[$($more:expr),*]($($arg:expr),*)) => {
        by_codes!(by_width: $codes, $width, $f[$($more),*]($($arg),*))
    };
    ($by:ident: $codes:expr, $width:expr, $f:ident[$($more:expr),*]($($arg:expr),*)) => {{
        use Scales::*;
        match ($codes.nibbles, $codes.scales) {
            (true, Single) => $by!($width, $f[true, Single as u8 $(, $more)*]($($arg),*)),
            (true, AroundEight) => $by!($width, $f[true, AroundEight as u8 $(, $more)*]($($arg),*)),
            (true, WithMinimum) => $by!($width, $f[true, WithMinimum as u8 $(, $more)*]($($arg),*)),
            (true, InUnits) => $by!($width, $f[true, InUnits as u8 $(, $more)*]($($arg),*)),
            (true, BySixteen) => $by!($width, $f[true, BySixteen as u8 $(, $more)*]($($arg),*)),
            (false, Single) => $by!($width, $f[false, Single as u8 $(, $more)*]($($arg),*)),
            (false, AroundEight) => $by!($width, $f[false, AroundEight as u8 $(, $more)*]($($arg),*)),
            (false, WithMinimum) => $by!($width, $f[false, WithMinimum as u8 $(, $more)*]($($arg),*)),
            (false, InUnits) => $by!($width, $f[false, InUnits as u8 $(, $more)*]($($arg),*)),
            (false, BySixteen) => $by!($width, $f[false, BySixteen as u8 $(, $more)*]($($arg),*)),
        }
    }};
}

/// Calls `$f::<T, R, W>` for products of rows of floats: as many rows of weights at once as are given, if that is
/// [`DOT_ROWS`](super::DOT_ROWS), or else one by one; `T` is the [`FloatType`](super::FloatType) as a number.
macro_rules! by_float {
    ($float:expr, ($rows:expr, $n_rows:expr), ($x:expr, $width:expr), $out:expr, $f:ident) => {
        match $float {
            FloatType::F32 => by_float!(@ F32, ($rows, $n_rows), ($x, $width), $out, $f),
            FloatType::F16 => by_float!(@ F16, ($rows, $n_rows), ($x, $width), $out, $f),
            FloatType::BF16 => by_float!(@ BF16, ($rows, $n_rows), ($x, $width), $out, $f),
        }
    };
    (@ $type:ident, ($rows:expr, $n_rows:expr), ($x:expr, $width:expr), $out:expr, $f:ident) => {
        if $n_rows == DOT_ROWS {
            by_float!(@ $type, DOT_ROWS, $width, $f($rows, $x, $out))
        } else {
            for (n, row) in $rows.chunks_exact($rows.len() / $n_rows).enumerate() {
                by_float!(@ $type, 1, $width, $f(row, $x, Output { ptr: $out.ptr.add(n), ..$out }))
            }
        }
    };
    (@ $type:ident, $n_rows:expr, $width:expr, $f:ident($($arg:expr),*)) => {
        match $width {
            1 => $f::<{ FloatType::$type as u8 }, { $n_rows }, 1>($($arg),*),
            2 => $f::<{ FloatType::$type as u8 }, { $n_rows }, 2>($($arg),*),
            3 => $f::<{ FloatType::$type as u8 }, { $n_rows }, 3>($($arg),*),
            _ => $f::<{ FloatType::$type as u8 }, { $n_rows }, 4>($($arg),*),
        }
    };
}

/// Calls `$f::<$type, R, U>` with the number of rows, 1 to 6, as a constant, each with a `U` of its own.
macro_rules! by_tile_rows {
    ($n_rows:expr, $f:ident[$type:ty; $u1:literal, $u2:literal, $u3:literal, $u4:literal, $u5:literal, $u6:literal]
        ($($arg:expr),*)) => {
        match $n_rows {
            1 => $f::<$type, 1, $u1>($($arg),*),
            2 => $f::<$type, 2, $u2>($($arg),*),
            3 => $f::<$type, 3, $u3>($($arg),*),
            4 => $f::<$type, 4, $u4>($($arg),*),
            5 => $f::<$type, 5, $u5>($($arg),*),
            _ => $f::<$type, 6, $u6>($($arg),*),
        }
    };
}

pub(super) use {by_codes, by_float, by_tile_rows, by_width};
