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

/// Calls `$f::<W, NIBBLES, SCALES, $more...>`, where `SCALES` is the kind of scales as a number.
macro_rules! by_codes {
    ($codes:expr, $width:expr, $f:ident[$($more:expr),*]($($arg:expr),*)) => {{
        use Scales::*;
        match ($codes.nibbles, $codes.scales) {
            (true, Single) => by_width!($width, $f[true, Single as u8 $(, $more)*]($($arg),*)),
            (true, AroundEight) => by_width!($width, $f[true, AroundEight as u8 $(, $more)*]($($arg),*)),
            (true, WithMinimum) => by_width!($width, $f[true, WithMinimum as u8 $(, $more)*]($($arg),*)),
            (true, InUnits) => by_width!($width, $f[true, InUnits as u8 $(, $more)*]($($arg),*)),
            (true, BySixteen) => by_width!($width, $f[true, BySixteen as u8 $(, $more)*]($($arg),*)),
            (false, Single) => by_width!($width, $f[false, Single as u8 $(, $more)*]($($arg),*)),
            (false, AroundEight) => by_width!($width, $f[false, AroundEight as u8 $(, $more)*]($($arg),*)),
            (false, WithMinimum) => by_width!($width, $f[false, WithMinimum as u8 $(, $more)*]($($arg),*)),
            (false, InUnits) => by_width!($width, $f[false, InUnits as u8 $(, $more)*]($($arg),*)),
            (false, BySixteen) => by_width!($width, $f[false, BySixteen as u8 $(, $more)*]($($arg),*)),
        }
    }};
}

pub(super) use {by_codes, by_width};
