package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"text/tabwriter"
)

// Row is one line of out/bench.json.
type Row struct {
	Name  string  `json:"name"`
	Unit  string  `json:"unit"`
	Value float64 `json:"value"` // the median
	N     int     `json:"n"`     // runs
	// Spread is the least and the greatest of the runs.
	Spread [2]float64 `json:"spread"`
}

// comparison is a set of subjects measured in turns. The first is the floor that the
// others are compared with.
type comparison struct {
	name     string
	about    string // one line for the table
	rounds   int
	warmUp   bool // one more round before, which does not count
	metrics  []metric
	subjects []subject
}

// metric is one figure of a run. Its name is part of the row's name, unless it is
// empty.
type metric struct {
	name, unit string
	// ratio adds a row that compares each subject with the floor, run by run.
	ratio bool
	// aim is the ratio to the floor that is aimed at, at most; 0 for none.
	aim float64
}

// subject is something that can be measured.
type subject struct {
	name string
	// run measures once and returns a value per metric of the comparison, in order.
	// A metric that the subject does not have is absent.
	run func(ctx context.Context) (sample, error)
}

// sample is one run's values by metric name.
type sample map[string]float64

func (c comparison) rowName(s subject, m metric) string {
	name := c.name + "/" + s.name
	if m.name != "" {
		name += "/" + m.name
	}
	return name
}

func (c comparison) rowNames() (names []string) {
	for i, s := range c.subjects {
		for _, m := range c.metrics {
			names = append(names, c.rowName(s, m))
			if i > 0 && m.ratio {
				names = append(names, c.rowName(s, m)+"/ratio")
			}
		}
	}
	return names
}

// only leaves the floor and those subjects of which a row matches, and no subject at
// all when none does.
func (c comparison) only(match *regexp.Regexp) comparison {
	matches := func(s subject) bool {
		one := comparison{name: c.name, metrics: c.metrics, subjects: []subject{{}, s}}
		return slices.ContainsFunc(one.rowNames(), func(name string) bool { return match.MatchString(name) })
	}
	all := c.subjects
	c.subjects = nil
	for i, s := range all {
		if i > 0 && matches(s) {
			c.subjects = append(c.subjects, s)
		}
	}
	if len(c.subjects) > 0 || len(all) > 0 && matches(all[0]) {
		c.subjects = append([]subject{all[0]}, c.subjects...)
	}
	return c
}

// compare measures the subjects in turns, each round beginning with another, so that
// what a run leaves behind, or what else the machine does, hits all of them alike.
func (b *bench) compare(ctx context.Context, c comparison) ([]Row, error) {
	rounds := c.rounds
	if b.o.rounds > 0 {
		rounds = b.o.rounds
	}
	samples := make([][]sample, len(c.subjects)) // by subject, then round
	first := 0
	if c.warmUp {
		first = -1
	}
	for round := first; round < rounds; round++ {
		for i := range c.subjects {
			turn := (i + max(round, 0)) % len(c.subjects)
			s := c.subjects[turn]
			if err := ctx.Err(); err != nil {
				return c.rows(samples), context.Cause(ctx)
			}
			values, err := s.run(ctx)
			if err != nil {
				return c.rows(samples), fmt.Errorf("%s: %w", s.name, err)
			}
			if round < 0 {
				continue
			}
			samples[turn] = append(samples[turn], values)
			line := fmt.Sprintf("%s/%s %d/%d", c.name, s.name, round+1, rounds)
			for _, m := range c.metrics {
				if v, ok := values[m.name]; ok {
					line += fmt.Sprintf("  %s %s %s", m.name, number(v), m.unit)
				}
			}
			progress("%s", line)
		}
	}
	return c.rows(samples), nil
}

// rows sums the runs up. A ratio is the median of the ratios of each round, in which
// both were measured one soon after the other.
func (c comparison) rows(samples [][]sample) (rows []Row) {
	add := func(name, unit string, values []float64) {
		if len(values) > 0 {
			rows = append(rows, Row{name, unit, median(values), len(values), [2]float64{slices.Min(values), slices.Max(values)}})
		}
	}
	for i, s := range c.subjects {
		for _, m := range c.metrics {
			var values, ratios []float64
			for round, v := range samples[i] {
				value, ok := v[m.name]
				if !ok {
					continue
				}
				values = append(values, value)
				if round < len(samples[0]) {
					if floor := samples[0][round][m.name]; floor > 0 {
						ratios = append(ratios, value/floor)
					}
				}
			}
			add(c.rowName(s, m), m.unit, values)
			if i > 0 && m.ratio {
				add(c.rowName(s, m)+"/ratio", "x", ratios)
			}
		}
	}
	return rows
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	if n%2 == 1 {
		return sorted[n/2]
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2
}

// number writes a figure with three significant digits or all of its integer ones.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

func printTable(out io.Writer, c comparison, rows []Row) {
	fmt.Fprintf(out, "\n%s: %s\n", c.name, c.about)
	byName := map[string]Row{}
	for _, r := range rows {
		byName[r.Name] = r
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\tmedian\tunit\tleast\tgreatest\truns\tof floor\taim\t")
	for _, m := range c.metrics {
		for i, s := range c.subjects {
			name := c.rowName(s, m)
			r, ok := byName[name]
			if !ok {
				continue
			}
			ratio, aim := "", ""
			if floor, ok := byName[name+"/ratio"]; ok {
				ratio = fmt.Sprintf("%.2f x", floor.Value)
				if m.aim > 0 {
					aim = fmt.Sprintf("<= %.2f met", m.aim)
					if floor.Value > m.aim {
						aim = fmt.Sprintf("<= %.2f MISSED", m.aim)
					}
				}
			} else if i == 0 && m.ratio {
				ratio = "floor"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t\n", name, number(r.Value), r.Unit,
				number(r.Spread[0]), number(r.Spread[1]), r.N, ratio, aim)
		}
	}
	w.Flush()
}

func writeRows(path string, rows []Row) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	data, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}
