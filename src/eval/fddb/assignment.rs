//! One-to-one assignment of detections to faces that maximises the total overlap (Hungarian
//! method, shortest augmenting paths with potentials).

/// Maximum-weight matching that grows a row at a time. After each row it is optimal for the rows so
/// far, which is what a ROC needs: detections enter by falling score.
#[derive(Clone, Debug)]
pub struct Assignment {
    columns: usize,
    weights: Vec<Vec<f64>>,
    /// Potentials of rows and columns, of the minimisation of minus the weight.
    row_potential: Vec<f64>,
    column_potential: Vec<f64>,
    row_of: Vec<Option<usize>>,
}

impl Assignment {
    /// No rows yet, over this many columns.
    pub fn new(columns: usize) -> Self {
        Self {
            columns,
            weights: Vec::new(),
            row_potential: Vec::new(),
            column_potential: vec![0.0; columns],
            row_of: vec![None; columns],
        }
    }

    /// Adds a row of non-negative weights, one a column. A row may stay without a column, which
    /// weighs 0. Takes O(columns * rows of the alternating tree), so n rows take O(n^3) at most.
    pub fn add_row(&mut self, weights: &[f64]) {
        assert_eq!(weights.len(), self.columns, "one weight a column");
        let new = self.weights.len();
        self.weights.push(weights.to_vec());
        self.row_potential.push(0.0);

        // Dijkstra over reduced costs. Each row has one more way out: to stay unmatched at cost 0.
        let mut slack = vec![f64::INFINITY; self.columns];
        let mut came_from: Vec<Option<usize>> = vec![None; self.columns];
        let mut in_tree = vec![false; self.columns];
        let (mut leave_slack, mut leave_from) = (f64::INFINITY, None);
        let (mut row, mut through) = (new, None);
        let last = loop {
            for j in (0..self.columns).filter(|&j| !in_tree[j]) {
                let reduced = -self.weights[row][j] - self.row_potential[row] - self.column_potential[j];
                if reduced < slack[j] {
                    (slack[j], came_from[j]) = (reduced, through);
                }
            }
            if -self.row_potential[row] < leave_slack {
                (leave_slack, leave_from) = (-self.row_potential[row], through);
            }
            let next =
                (0..self.columns).filter(|&j| !in_tree[j]).min_by(|&a, &b| slack[a].total_cmp(&slack[b]));
            let step = next.map_or(leave_slack, |j| slack[j].min(leave_slack));
            self.row_potential[new] += step;
            for j in 0..self.columns {
                if !in_tree[j] {
                    slack[j] -= step;
                } else if let Some(r) = self.row_of[j] {
                    self.row_potential[r] += step;
                    self.column_potential[j] -= step;
                }
            }
            leave_slack -= step;
            match next {
                Some(j) if slack[j] < leave_slack => {
                    in_tree[j] = true;
                    match self.row_of[j] {
                        Some(r) => (row, through) = (r, Some(j)),
                        None => break Some(j),
                    }
                }
                // The row reached through `leave_from` gives its column up.
                _ => break leave_from,
            }
        };
        // Shift the matches along the path back to the new row.
        let mut at = last;
        while let Some(j) = at {
            at = came_from[j];
            self.row_of[j] = Some(at.map_or(new, |previous| self.row_of[previous].expect("on the path")));
        }
    }

    /// Row matched to each column.
    pub fn rows(&self) -> &[Option<usize>] {
        &self.row_of
    }

    /// Weights of the matched pairs, in order of the columns.
    pub fn matched_weights(&self) -> impl Iterator<Item = f64> + '_ {
        self.row_of.iter().enumerate().filter_map(|(j, row)| row.map(|r| self.weights[r][j]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn total(rows: &[Vec<f64>], columns: usize) -> f64 {
        let mut a = Assignment::new(columns);
        rows.iter().for_each(|r| a.add_row(r));
        a.matched_weights().sum()
    }

    /// Best total over all matchings, by trying them.
    fn brute_force(rows: &[Vec<f64>], used: &mut Vec<bool>) -> f64 {
        let Some((first, rest)) = rows.split_first() else { return 0.0 };
        let mut best = brute_force(rest, used);
        for j in 0..used.len() {
            if !used[j] {
                used[j] = true;
                best = best.max(first[j] + brute_force(rest, used));
                used[j] = false;
            }
        }
        best
    }

    #[test]
    fn a_greedy_choice_is_undone_when_the_total_gains() {
        // Greedy would take 0.9 and leave 0.1; the optimum is 0.8 + 0.7.
        let mut a = Assignment::new(2);
        a.add_row(&[0.9, 0.8]);
        assert_eq!(a.rows(), [Some(0), None]);
        a.add_row(&[0.7, 0.1]);
        assert_eq!(a.rows(), [Some(1), Some(0)]);
        // A third row pushes the second out altogether.
        a.add_row(&[0.95, 0.0]);
        assert_eq!(a.rows(), [Some(2), Some(0)]);
        assert!((a.matched_weights().sum::<f64>() - 1.75).abs() < 1e-12);
    }

    #[test]
    fn no_columns_and_no_rows_match_nothing() {
        let mut none = Assignment::new(0);
        none.add_row(&[]);
        assert_eq!(none.matched_weights().count(), 0);
        assert_eq!(total(&[], 3), 0.0);
    }

    proptest! {
        #[test]
        fn total_equals_brute_force_after_every_row(
            (columns, flat) in (0usize..6).prop_flat_map(|c| {
                // Few distinct values, so that ties are common.
                (Just(c), proptest::collection::vec(proptest::collection::vec(0u8..8, c), 0..6))
            }),
        ) {
            let rows: Vec<Vec<f64>> =
                flat.iter().map(|r| r.iter().map(|&w| w as f64 / 7.0).collect()).collect();
            for n in 0..=rows.len() {
                let best = brute_force(&rows[..n], &mut vec![false; columns]);
                prop_assert!((total(&rows[..n], columns) - best).abs() < 1e-9);
            }
        }
    }
}
