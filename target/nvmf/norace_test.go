//go:build !race

package nvmf_test

const raceDetector = false
