package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

// output prints data as a table for people or as JSON for programs.
type output struct{ json bool }

func (o *output) register(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
}

func (o *output) print(w io.Writer, data any, table func(*tabwriter.Writer)) error {
	if o.json {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(data)
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	table(tw)
	return tw.Flush()
}

func row(w io.Writer, cells ...any) {
	text := make([]string, len(cells))
	for i, c := range cells {
		text[i] = fmt.Sprint(c)
	}
	fmt.Fprintln(w, strings.Join(text, "\t"))
}

func bytesText(n int64) string { return units.BytesSize(float64(n)) }

func ageText(unixNanos int64) string {
	if unixNanos == 0 {
		return "-"
	}
	return units.HumanDuration(time.Since(time.Unix(0, unixNanos))) + " ago"
}

// count writes "1 block", "2 blocks".
func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprint(n, " ", many)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
