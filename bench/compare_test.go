package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"testing"
)

// counting is a comparison whose subjects return the values given, in order, and note
// who ran.
func counting(ran *[]string, values map[string][]float64) comparison {
	c := comparison{name: "c", rounds: 2, metrics: []metric{{"", "s", true, 1.5}, {name: "cpu", unit: "CPU s"}}}
	for _, name := range []string{"floor", "a", "b"} {
		c.subjects = append(c.subjects, subject{name, func(context.Context) (sample, error) {
			*ran = append(*ran, name)
			if len(values[name]) == 0 {
				return nil, errors.New("no more")
			}
			v := values[name][0]
			values[name] = values[name][1:]
			return sample{"": v}, nil
		}})
	}
	return c
}

func TestCompare(t *testing.T) {
	var ran []string
	c := counting(&ran, map[string][]float64{"floor": {2, 8}, "a": {4, 4}, "b": {1, 2}})
	rows, err := new(bench).compare(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"floor", "a", "b", "a", "b", "floor"}; !slices.Equal(ran, want) {
		t.Errorf("ran %v, want %v", ran, want)
	}
	// a is twice and half the floor: the medians' ratio would be 4/5.
	want := []Row{
		{"c/floor", "s", 5, 2, [2]float64{2, 8}},
		{"c/a", "s", 4, 2, [2]float64{4, 4}}, {"c/a/ratio", "x", 1.25, 2, [2]float64{0.5, 2}},
		{"c/b", "s", 1.5, 2, [2]float64{1, 2}}, {"c/b/ratio", "x", 0.375, 2, [2]float64{0.25, 0.5}},
	}
	if !reflect.DeepEqual(rows, want) {
		t.Errorf("got %v\nwant %v", rows, want)
	}

	path := filepath.Join(t.TempDir(), "out", "bench.json")
	if err := writeRows(path, rows); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var back []map[string]any
	if err := json.Unmarshal(raw, &back); err != nil || len(back) != len(rows) {
		t.Fatalf("%v: %s", err, raw)
	}
	for _, key := range []string{"name", "unit", "value", "n", "spread"} {
		if back[0][key] == nil {
			t.Errorf("no %s in %v", key, back[0])
		}
	}
}

func TestCompareKeepsWhatItHas(t *testing.T) {
	var ran []string
	c := counting(&ran, map[string][]float64{"floor": {2, 8}, "a": {4, 4}, "b": {1}})
	rows, err := new(bench).compare(t.Context(), c)
	if err == nil || len(rows) != 5 || rows[0].N != 1 {
		t.Errorf("%v, %v", rows, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := new(bench).compare(ctx, c); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestOnly(t *testing.T) {
	var ran []string
	for match, want := range map[string][]string{
		"":            {"floor", "a", "b"},
		"c/b":         {"floor", "b"},
		"^c/a/ratio$": {"floor", "a"},
		"floor":       {"floor"},
		"nothing":     nil,
	} {
		var got []string
		for _, s := range counting(&ran, nil).only(regexp.MustCompile(match)).subjects {
			got = append(got, s.name)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q chooses %v, want %v", match, got, want)
		}
	}
}

// TestRowNames holds the names to one form: they are what -run matches.
func TestRowNames(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range new(bench).comparisons() {
		for _, name := range c.rowNames() {
			if seen[name] || !regexp.MustCompile(`^[a-z0-9-]+(/[a-z0-9-]+){1,3}$`).MatchString(name) {
				t.Errorf("row %q is there twice or has an odd name", name)
			}
			seen[name] = true
		}
	}
	if len(seen) < 100 {
		t.Errorf("only %d rows", len(seen))
	}
}
