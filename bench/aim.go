package main

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// aim is something that a figure should reach. It is checked against the rows of a
// run, and is left out when they do not have it.
type aim struct {
	what string
	row  string  // the figure
	min  float64 // at least; 0 for no bound
	max  float64 // at most; 0 for no bound
}

// netAims are what the I/O over connections should reach.
func netAims() (all []aim) {
	all = append(all,
		aim{"NVMe/TCP, 32 reads at a time: IOPS", "io-nvme-randread-4k-qd32/shared-nothing/iops", 100e3, 0},
		aim{"NVMe/TCP, 32 reads at a time: CPU seconds of the target per million", "io-nvme-randread-4k-qd32/shared-nothing/cpu", 0, 9},
		aim{"NVMe/TCP, 32 writes at a time: IOPS", "io-nvme-randwrite-4k-qd32/shared-nothing/iops", 100e3, 0},
		aim{"NVMe/TCP, 32 writes at a time: CPU seconds of the target per million", "io-nvme-randwrite-4k-qd32/shared-nothing/cpu", 0, 9},
		aim{"an idle connection: CPU seconds of the target per second", "io-idle/shared-nothing/cpu", 0, 0.01},
		aim{"allocations per read, NVMe/TCP", "io-nvme-randread-4k-qd32/shared-nothing/allocs", 0, 0.02},
		aim{"allocations per read, NVMe/TCP, lvol", "io-lvol-nvme-randread-4k-qd32/shared-nothing/allocs", 0, 0.02},
		aim{"allocations per read, NBD", "io-nbd-randread-4k-qd32/shared-nothing/allocs", 0, 0.02},
	)
	for _, p := range netPatterns {
		name := "io-nbd-" + p.name
		all = append(all,
			aim{"NBD against nbdkit: IOPS, " + p.about(), name + "/shared-nothing/iops/ratio", 1, 0},
			aim{"NBD against nbdkit: CPU of the server, " + p.about(), name + "/shared-nothing/cpu/ratio", 0, 1})
	}
	for _, p := range netPatterns {
		name := "io-qcow2-" + p.name
		all = append(all, aim{"qcow2 against qemu-nbd: IOPS, " + p.about(), name + "/thaw-qcow2/iops/ratio", 1.5, 0})
	}
	// Not over NBD, where fio's CPU is what limits both engines.
	for _, p := range enginePatterns {
		least := 1.7
		if p.write {
			least = 1.25
		}
		all = append(all, aim{"engines, memory, NVMe/TCP: IOPS of shared-nothing against thread-pool, " + p.about(),
			"io-memory-nvme-" + p.name + "/shared-nothing/iops/ratio", least, 0})
	}
	return all
}

// met tells whether a figure reaches the aim.
func (a aim) met(value float64) bool {
	return (a.min == 0 || value >= a.min) && (a.max == 0 || value <= a.max)
}

// printAims says for each aim whose figures were measured whether it is met.
func printAims(out io.Writer, aims []aim, all []Row) {
	rows := map[string]Row{}
	for _, r := range all {
		rows[r.Name] = r
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	title := "\naims of I/O over connections\n"
	for _, a := range aims {
		r, known := rows[a.row]
		if !known {
			continue
		}
		fmt.Fprint(w, title)
		title = ""
		bound := ">= " + number(a.min)
		if a.min == 0 {
			bound = "<= " + number(a.max)
		}
		verdict := "met"
		if !a.met(r.Value) {
			verdict = "MISSED"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", a.what, number(r.Value), r.Unit, bound, verdict)
	}
	w.Flush()
}

// printWide prints a comparison with a line per subject and a column per metric:
// medians, and how the first metric compares with the floor.
func printWide(out io.Writer, c comparison, all []Row) {
	rows := map[string]Row{}
	for _, r := range all {
		rows[r.Name] = r
	}
	fmt.Fprintf(out, "\n%s: %s\n", c.name, c.about)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, m := range c.metrics {
		fmt.Fprintf(w, "\t%s", m.name)
		if m.ratio {
			fmt.Fprint(w, "\tof floor")
		}
	}
	fmt.Fprintln(w, "\truns\t")
	for _, s := range c.subjects {
		fmt.Fprint(w, s.name)
		runs := 0
		for _, m := range c.metrics {
			r, ok := rows[c.rowName(s, m)]
			if runs = max(runs, r.N); ok {
				fmt.Fprintf(w, "\t%s", number(r.Value))
			} else {
				fmt.Fprint(w, "\t-")
			}
			if !m.ratio {
				continue
			}
			if ratio, ok := rows[c.rowName(s, m)+"/ratio"]; ok {
				fmt.Fprintf(w, "\t%s x", number(ratio.Value))
			} else {
				fmt.Fprint(w, "\t")
			}
		}
		fmt.Fprintf(w, "\t%d\t\n", runs)
	}
	w.Flush()
}
